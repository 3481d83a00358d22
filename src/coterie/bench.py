"""How fast a run is on this machine, what bounds it, and where the time goes.

    some updates, timed                       -> seconds of rollout and learning
    the turns and advantages of each update   -> the least that must be computed for them (`coterie.lm.cost`)
    matrix products, timed between updates    -> the seconds that takes at best: the limit
    one more update under torch's profiler    -> shares of matrix products, adapters, attention, sampling, Python, …

`Meter` does this for one environment and is what the repository's benchmarks use too. It watches the loop through
what the loop offers (its records, its `keep` callback, its credit scheme), so it does not depend on how engine and
learner work. Nothing is written to disk; training moves the adapters in memory only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from coterie.config import RunConfig
from coterie.credit.base import Magnetised
from coterie.environment import MultiModelEnvironment
from coterie.monitor.console import Observer, Silent
from coterie.monitor.metrics import UpdateRecord
from coterie.monitor.tables import Cell, ResultTable
from coterie.types import Advantages, Episode, FailedEpisode, Tier

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

    from coterie.credit.base import Credit
    from coterie.lm.base import BaseModel
    from coterie.lm.cost import Adapters, DecoderShape, Work

T = TypeVar("T")

ROLLOUT, LEARNING = "rollout", "learning"
PHASES = (ROLLOUT, LEARNING)

KINDS = ("matrix products", "adapters", "attention", "sampling and loss", "copies", "element-wise", "Python")
"""What time goes to. Python is whatever passes outside torch's operations and our own."""

_MATRIX = re.compile(r"aten::(mm|addmm|linear|addmv|mv|dot|mkldnn_linear.*|_.*mm.*)|mkldnn.*|mkl::.*|coterie::product")
_BATCHED = re.compile(r"aten::(bmm|baddbmm|matmul|einsum)")
_ADAPTERS = re.compile(r"coterie::(add_low_rank|low_rank_gradients)")
_ATTENTION = re.compile(
    r"aten::(_?scaled_dot_product.*|_softmax.*|softmax.*|_?flex_attention.*)"
    r"|coterie::(attend|attend_tree|attend_tree_backward|masked_softmax|softmax_scores_backward)"
)
_SAMPLING = re.compile(
    r"aten::(_?log_softmax.*|logsumexp|exp_?|log_?|cumsum_?|searchsorted|bucketize|multinomial|argmax|topk|sort"
    r"|exponential_|special_entr|entropy|nll_loss.*|xlogy)|coterie::(summarise|pick|softmax_backward)"
)
_COPIES = re.compile(
    r"aten::(copy_|clone|contiguous|_to_copy|to|cat|stack|index.*|gather.*|scatter.*|embedding.*|fill_|zero_|zeros.*"
    r"|new_zeros|masked_fill.*|repeat.*|constant_pad_nd|slice_backward|select_backward|as_strided.*)|coterie::(pack_panels|gather)"
)
_BORDER = "coterie: learning begins"


# -- one update -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PhaseMeasure:
    """One phase of one update."""

    seconds: float
    flops: float
    """Least floating-point operations, where rollout hands its forward pass on to learning."""
    separate_flops: float
    """Least floating-point operations of a phase that computes all it needs itself."""
    sampled: int
    """Tokens sampled, or trained on."""
    distinct: int
    """Tokens that must be computed."""
    naive: int
    """Tokens that one sequence at a time would compute."""

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class UpdateMeasure:
    """One update."""

    seconds: float
    phases: Mapping[str, PhaseMeasure]
    turns: int


class _Recorded:
    """A credit scheme whose last advantages can be looked at; its call marks where learning begins."""

    def __init__(self, credit: Credit) -> None:
        self.credit = credit
        self.last: Advantages | None = None

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        from torch.profiler import record_function

        with record_function(_BORDER):
            self.last = self.credit.advantages(episodes)
        return self.last

    def state(self) -> dict[str, Any]:
        return self.credit.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.credit.restore(state)


class Meter:
    """Measures updates of one environment, which must not have a run folder and must not be built yet."""

    def __init__(self, environment: MultiModelEnvironment) -> None:
        from coterie.lm.cost import Adapters, DecoderShape

        self.environment = environment
        self.loop = environment.build()
        self.base = environment.base
        self._credit = _Recorded(self.loop.credit)
        self.loop.credit = self._credit
        self.loop.keep = self._keep
        self._episodes: Sequence[Episode] = ()
        config = environment.config
        self.shape: DecoderShape = DecoderShape.of(self.base.model.config)
        adapted = max(1, round(self.shape.layers * config.base.lora_layers))
        self._adapters = Adapters({}, config.base.lora_targets, adapted)

    async def update(self) -> UpdateMeasure:
        """One more update, measured."""
        (record,) = await self.environment.train_cycles(1)
        return self._measured(record)

    async def profiled(self, typical: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Seconds by phase and kind of one more update.

        `typical`: seconds each phase takes without a profiler, which slows down what stands between operations.
        """
        (record,), recorded = await profiled(self.environment.train_cycles(1), self.base)
        walls = {ROLLOUT: record.seconds["rollout"], LEARNING: record.seconds["learn"]}
        border = min((event.time_range.start for event in recorded if event.name == _BORDER), default=math.inf)
        found = {}
        for phase in PHASES:
            events = [event for event in recorded if (event.time_range.start >= border) == (phase == LEARNING)]
            found[phase] = by_kind(events, min(walls[phase], typical[phase]), self.shape.head_dim)
        return found

    def _keep(
        self, update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], record: UpdateRecord | None
    ) -> None:
        self._episodes = episodes

    def _measured(self, record: UpdateRecord) -> UpdateMeasure:
        rollout, learning = self._work()
        played, learned = self._rollout_flops(rollout), self._learning_flops(learning)
        recalled = self._recalled_flops(learning, record)
        turns = sum(len(t.turns) for e in self._episodes for t in e.trajectories.values())
        phases = {
            ROLLOUT: self._phase(record.seconds["rollout"], rollout, played, played),
            LEARNING: self._phase(record.seconds["learn"], learning, learned - recalled, learned),
        }
        return UpdateMeasure(record.seconds["total"], phases, turns)

    @staticmethod
    def _phase(seconds: float, work: Work, flops: float, separate: float) -> PhaseMeasure:
        return PhaseMeasure(seconds, flops, separate, work.sampled, work.distinct, work.naive)

    def _work(self) -> tuple[Work, Work]:
        """What the last update's rollout and learning had to compute."""
        from coterie.lm.cost import Work

        rollout, learning = Work(), Work()
        models, vocabulary = self.environment.models, self.shape.vocabulary
        advantages, keep_zero = self._credit.last, self.loop.learner.keep_zero
        assert advantages is not None
        for episode in self._episodes:
            for seat, trajectory in episode.trajectories.items():
                for number, turn in enumerate(trajectory.turns):
                    if turn.tier is Tier.LOCAL:
                        player = turn.adapter.name if turn.adapter is not None else None
                        rollout.add(player, turn.prompt_ids, turn.token_ids, turn.allowed, vocabulary)
                    trained = turn.trainable and turn.model_id in models
                    if trained and (keep_zero or advantages.of(episode.episode_id, seat, number) != 0.0):
                        learning.add(turn.model_id, turn.prompt_ids, turn.token_ids, turn.allowed, vocabulary)
        return rollout, learning

    def _rollout_flops(self, work: Work) -> float:
        from coterie.lm.cost import forward_flops

        return forward_flops(self.shape, work, self._ranked(work))

    def _learning_flops(self, work: Work) -> float:
        from coterie.lm.cost import backward_flops, forward_flops

        learner, adapters = self.environment.config.learner, self._ranked(work)
        flops = forward_flops(self.shape, work, adapters) + backward_flops(self.shape, work, adapters)
        flops *= learner.passes
        # anchors are computed once, whatever the passes; those that stay know the choices of earlier updates
        known = all(
            turn.allowed is not None for e in self._episodes for tr in e.trajectories.values() for turn in tr.turns
        )
        if learner.kl_coefficient > 0 and not known:
            flops += forward_flops(self.shape, work, self._adapters)
        credit = self.loop.credit
        if isinstance(credit, Magnetised) and credit.magnet.strength > 0 and not (known and credit.magnet.every == 0):
            flops += forward_flops(self.shape, work, adapters)
        return flops

    def _recalled_flops(self, work: Work, record: UpdateRecord) -> float:
        """Of the forward pass over tokens that rollout had computed."""
        from coterie.lm.cost import forward_flops

        packed = record.metrics["learn/packed_tokens"]
        if not packed:
            return 0.0
        share = record.metrics["learn/recalled_tokens"] / packed * self.environment.config.learner.passes
        return share * forward_flops(self.shape, work, self._ranked(work))

    def _ranked(self, work: Work) -> Adapters:
        from dataclasses import replace

        ranks = {m.model_id: m.config.lora_rank for m in self.environment.models.values()}
        names = [policy for policy in work.tokens if policy is not None]
        return replace(self._adapters, ranks={name: ranks.get(name.split("@v")[0], 0) for name in names})


# -- where the time goes --------------------------------------------------------------------------------------------


async def profiled(work: Awaitable[T], base: BaseModel) -> tuple[T, list[FunctionEvent]]:
    """Await `work`, which computes with `base`, under torch's profiler; what it returned, and every operation."""
    from torch.autograd.profiler import profile

    # else it says on standard error that it starts and stops, into a live table or beside JSON
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    other = base.device.type if base.device.type != "cpu" else None
    told = base.kernels.told() if base.kernels is not None else nullcontext()
    with told, profile(use_device=other, use_kineto=other is not None, record_shapes=True) as recorded:
        returned = await work
    return returned, list(recorded.function_events or ())


def by_kind(events: Sequence[FunctionEvent], wall: float, head_dim: int) -> dict[str, float]:
    """Seconds by kind of profiled operations that took `wall` seconds in all, Python included."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        shapes: Any = event.input_shapes or ()
        kind = kind_of(event.name, shapes, head_dim)
        if kind is not None:
            found[kind] += 1e-6 * max(event.self_cpu_time_total, event.self_device_time_total)
    found["Python"] = max(0.0, wall - sum(found.values()))
    return found


def kind_of(name: str, shapes: Sequence[Sequence[int]], head_dim: int) -> str | None:
    """Which of `KINDS` a profiled operation belongs to; None: no operation of torch or ours.

    Batched products are attention's when one of their dimensions is that of a head, and of adapters otherwise.
    """
    if "::" not in name:
        return None
    if _BATCHED.fullmatch(name):
        sizes = {size for shape in shapes for size in shape[-2:]} if shapes else {head_dim}
        return "attention" if head_dim in sizes else "adapters"
    for kind, pattern in zip(KINDS, (_MATRIX, _ADAPTERS, _ATTENTION, _SAMPLING, _COPIES), strict=False):
        if pattern.fullmatch(name):
            return kind
    return "element-wise"


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each kind's share of the whole; empty when nothing took time."""
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()} if total else {}


# -- the report -----------------------------------------------------------------------------------------------------


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
