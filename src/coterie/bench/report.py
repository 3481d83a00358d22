"""`bench`: updates of a config, measured, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from coterie.bench.meter import PHASES, Meter, UpdateMeasure
from coterie.bench.profile import KINDS, shares
from coterie.config import RunConfig
from coterie.environment import MultiModelEnvironment
from coterie.monitor.console import Observer, Silent
from coterie.monitor.tables import Cell, ResultTable


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `coterie bench` found."""

    facts: Mapping[str, Any]
    """Base, dtype, device, threads, policies, versions."""
    rates: tuple[float, ...]
    """Floating-point operations a second of matrix products, before the first update and after each."""
    updates: tuple[UpdateMeasure, ...]
    profile: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds by phase and kind."""

    def limits(self, phase: str) -> list[float]:
        """Seconds each update's phase takes at the rate measured around it."""
        around = zip(self.rates, self.rates[1:], strict=False)
        return [u.phases[phase].flops / fmean(pair) for u, pair in zip(self.updates, around, strict=True)]

    def phase(self, name: str) -> dict[str, float | None]:
        """Medians over the updates."""
        found = [update.phases[name] for update in self.updates]
        seconds = [measure.seconds for measure in found]
        reached = [limit / measure.seconds for limit, measure in zip(self.limits(name), found, strict=True)]
        return {
            "seconds": median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "tokens_per_second": median(m.sampled / m.seconds for m in found),
            "distinct_tokens": median(m.distinct for m in found),
            "distinct_tokens_per_second": median(m.distinct / m.seconds for m in found),
            "naive_tokens_per_second": median(m.naive / m.seconds for m in found),
            "limit_seconds": median(self.limits(name)),
            "share_of_limit": median(reached) if any(m.flops for m in found) else None,
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **self.facts,
            "gflops_per_second": median(self.rates) / 1e9,
            "updates": len(self.updates),
            "update_seconds": median(update.seconds for update in self.updates),
            "phases": {name: self.phase(name) for name in PHASES},
            "time": {name: shares(self.profile.get(name, {})) for name in PHASES},
        }

    def tables(self) -> list[ResultTable]:
        """What is shown: speed, and where the time goes."""
        speed = []
        for name in PHASES:
            found = self.phase(name)
            speed.append(
                (name, found["seconds"], _whole(found["tokens_per_second"]), _whole(found["distinct_tokens"]),
                 _whole(found["distinct_tokens_per_second"]), _whole(found["naive_tokens_per_second"]),
                 found["limit_seconds"], found["share_of_limit"])
            )  # fmt: skip
        columns = ("", "seconds", "tokens/s", "distinct", "distinct/s", "one by one/s", "limit, s", "of the limit")
        parts = {name: shares(self.profile.get(name, {})) for name in PHASES}
        rows = [(kind, *(_percent(parts[name].get(kind)) for name in PHASES)) for kind in KINDS]
        f = self.facts
        title = (
            f"{f['base']}, {f['dtype']} on {f['device']}, {f['threads']} threads, {f['policies']} policies, "
            f"matrix products at {median(self.rates) / 1e9:.0f} GFLOP/s"
        )
        return [
            ResultTable(title, columns, tuple(speed)),
            ResultTable("where the time goes, %", ("", *PHASES), tuple(rows)),
        ]


def _whole(value: float | None) -> Cell:
    return None if value is None else round(value)


def _percent(share: float | None) -> Cell:
    return None if share is None else round(100 * share, 1)


async def bench(config: RunConfig, updates: int = 3, observer: Observer | None = None) -> BenchReport:
    """Measure `updates` updates of a config after one that warms up, then profile one more.

    Raises:
        CoterieError: what building or playing raises.
    """
    import torch

    from coterie.lm.cost import matmul_rate

    observer = observer or Silent()
    environment = MultiModelEnvironment(config=_plain(config, updates), observer=observer)
    try:
        meter = Meter(environment)
        meter.loop.observer = Silent()
        base = meter.base
        observer.stage("warming up")
        await meter.update()
        rates, found = [matmul_rate(base.dtype, base.device)], []
        observer.stage("measuring")
        for number in range(updates):
            found.append(await meter.update())
            rates.append(matmul_rate(base.dtype, base.device))
            observer.progress("measuring", number + 1, updates)
        observer.stage("profiling")
        typical = {phase: median(update.phases[phase].seconds for update in found) for phase in PHASES}
        profile = await meter.profiled(typical)
    finally:
        await environment.aclose()
    facts = {
        "config": config.name,
        "base": config.base.model,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "policies": len(environment.models),
        "episodes": config.rollout.tasks_per_update * config.rollout.group_size,
        "turns": round(median(update.turns for update in found)),
    }
    return BenchReport(facts, tuple(rates), tuple(found), profile)


def _plain(config: RunConfig, updates: int) -> RunConfig:
    """The same run without evaluation in between, long enough for what is measured."""
    evaluation = config.evaluation.model_copy(update={"every": 0, "until": {}})
    return config.model_copy(update={"evaluation": evaluation, "updates": max(config.updates, updates + 2)})
