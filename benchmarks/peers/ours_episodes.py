"""Coterie's loop around the model: many episodes at once with an engine that answers at once.

spec: model (for its tokenizer), scenario ("matrix": two models, four rounds of a dilemma, eight turns an episode;
"tasks": the default training job, where prompts differ), episodes (at once), engine ("instant", or "local": the real
one, for comparison). go: {}, or {"profile": true} for where the time of one more update goes.

What is timed is an update without the model: tasks, tables, seats, prompts, the event loop, scores, rewards, credit,
the learner's batch, metrics. The instant engine lets every episode of the update wait before it answers any, and what
it spends itself is taken off. After each update its limit is measured: what Python's event loop takes for as many
coroutines that wait as often and do nothing else.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from protocol import Facts, Repetition, serve, versions

from coterie.collector import RareCollections
from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.rollout.runner import with_services
from coterie.training.base import LearnerStats, StepStats
from coterie.types import AdapterVersion, Episode, GenerateRequest, Generation, Tier

GROUP = 10
"""Episodes of one task."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "matrix": {
        "mode": "competitive",
        "models": [{"model_id": "row"}, {"model_id": "column"}],
        "scenario": {"id": "matrix", "options": {"game": "prisoners_dilemma", "rounds": 4}},
    },
    "tasks": {"mode": "cooperative", "preset": "cooperative_team", "scenario": {"id": "tasks"}},
}

Route = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Token ids of a choice, and what each was chosen among."""


class InstantEngine:
    """Answers all that wait at once, with the first tokens that come to hand."""

    tier = Tier.LOCAL

    def __init__(self) -> None:
        self.seconds = 0.0
        """Spent in here."""
        self.waves: list[int] = []
        """How many requests waited at once, each time."""
        self._waiting: list[tuple[GenerateRequest, asyncio.Future[Generation]]] = []
        self._paths: dict[tuple[tuple[int, ...], ...], list[Route]] = {}

    async def generate(self, request: GenerateRequest) -> Generation:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._answer)
        future: asyncio.Future[Generation] = loop.create_future()
        self._waiting.append((request, future))
        return await future

    def _answer(self) -> None:
        started = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        self.waves.append(len(waiting))
        for request, future in waiting:
            future.set_result(self._made(request))
        self.seconds += time.perf_counter() - started

    def _made(self, request: GenerateRequest) -> Generation:
        choice = allowed = None
        if request.choices is None:
            tokens: tuple[int, ...] = (1000 + request.seed % 1000, 2000, *request.stop_ids[:1])[: request.max_tokens]
        else:
            paths = self._paths.get(request.choices) or self._walk(request.choices)
            choice = request.seed % len(paths)
            tokens, allowed = paths[choice]
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=tokens, logprobs=(-0.7,) * len(tokens), allowed=allowed,
            entropy=(0.7,) * len(tokens), adapter=request.adapter, tier=self.tier,
            finish_reason="stop" if choice is None else "choice", choice=choice,
        )  # fmt: skip

    def _walk(self, choices: tuple[tuple[int, ...], ...]) -> list[Route]:
        found = self._paths[choices] = []
        for ids in choices:
            among = [
                tuple(sorted({other[at] for other in choices if other[:at] == ids[:at] and len(other) > at}))
                for at in range(len(ids))
            ]
            found.append((ids, tuple(among)))
        return found

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None: ...

    async def close(self) -> None: ...


class Bell:
    """Lets all who wait go on at once."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._ring)
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        await future

    def _ring(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(None)


async def only_waiting(count: int, waves: Sequence[int], collector: RareCollections) -> float:
    """Seconds that `count` coroutines take to wait as those of an update did: in each wave all of them together for as
    many answers as came then."""
    bell = Bell()

    async def play(number: int) -> None:
        for asked in waves:
            # the first asked % count of them wait for one more
            width = asked // count + (number < asked % count)
            await asyncio.gather(*(bell.wait() for _ in range(width)))

    with collector:
        started = time.perf_counter()
        await asyncio.gather(*(play(number) for number in range(count)))
        return time.perf_counter() - started


class NoLearner:
    """Takes the batch and does nothing with it."""

    keep_zero = False

    def listening(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, batch: Any, update: int) -> LearnerStats:
        return LearnerStats({model_id: StepStats() for model_id in batch.policies})


def by_area(recorded: cProfile.Profile) -> dict[str, float]:
    """Seconds by part of Coterie, or by library, without what the engine here spends."""
    found: dict[str, float] = {}
    stats = pstats.Stats(recorded).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, callers) in stats.items():
        if file == __file__:
            continue
        # built-in functions are their callers' time
        places = [(file, own)] if file != "~" else [(at[0], times[2]) for at, times in callers.items()]
        for place, seconds in places:
            if place != __file__:
                area = _area(place) if place != "~" else name.strip("<>")
                found[area] = found.get(area, 0.0) + seconds
    return found


def _area(file: str) -> str:
    parts = Path(file).parts
    for package in ("coterie", "transformers", "tokenizers", "jinja2", "asyncio"):
        if package in parts[:-1]:
            inner = parts[len(parts) - 1 - parts[::-1].index(package) + 1]
            return f"coterie.{inner.removesuffix('.py')}" if package == "coterie" else package
    return "Python's library"


def run_config(spec: Facts) -> RunConfig:
    data = {
        **SCENARIOS[spec["scenario"]],
        "updates": 10_000,
        "base": {"model": spec["model"]},
        "rollout": {"tasks_per_update": max(1, spec["episodes"] // GROUP), "group_size": min(GROUP, spec["episodes"])},
        "credit": {"scheme": "group_relative"},
        "engine": {"calibration": False},
    }
    return parse_config(data)


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    environment = MultiModelEnvironment(config=run_config(spec))
    parts = environment.build()
    engine = InstantEngine()
    if spec["engine"] == "instant":
        parts.engine = engine
        parts.runner = with_services(parts.runner, engine=engine)
        parts.learner = NoLearner()
    counted = {"episodes": 0, "turns": 0}

    def keep(update: int, episodes: Sequence[Episode], failed: Sequence[Any], record: Any) -> None:
        counted["episodes"] = len(episodes)
        counted["turns"] = sum(len(t.turns) for e in episodes for t in e.trajectories.values())
        if failed:
            raise ValueError(f"{len(failed)} of {len(episodes) + len(failed)} episodes failed: {failed[0].error}")

    parts.keep = keep
    loop = asyncio.new_event_loop()
    collector = RareCollections()
    before = int(psutil.Process().memory_info().rss)

    def repeat(asked: Facts) -> Facts:
        if asked.get("profile"):
            recorded = cProfile.Profile()
            recorded.runcall(loop.run_until_complete, environment.train_cycles(1))
            return {"profile": {"update": by_area(recorded)}}
        engine.seconds = 0.0
        engine.waves.clear()
        (record,) = loop.run_until_complete(environment.train_cycles(1))
        total = record.seconds["total"]
        alone = {}
        if engine.waves:
            alone["loop_seconds"] = loop.run_until_complete(only_waiting(counted["episodes"], engine.waves, collector))
        return {
            "seconds": total - engine.seconds,
            "engine_seconds": engine.seconds,
            "rollout_seconds": record.seconds["rollout"] - engine.seconds,
            "learn_seconds": record.seconds["learn"],
            **counted,
            **alone,
            "concurrent": max(engine.waves, default=0),
            "grown": int(psutil.Process().memory_info().rss) - before,
        }

    warm = repeat({})
    return {"versions": versions("coterie", "transformers"), "warm_up": warm}, repeat


if __name__ == "__main__":
    serve(prepare)
