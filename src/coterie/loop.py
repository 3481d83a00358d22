"""The training loop: play, divide, credit, learn, publish. Everything else hangs off a step of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from coterie.collector import RareCollections
from coterie.config import RunConfig
from coterie.credit.base import Credit
from coterie.errors import ConfigError, CoterieError, ScenarioError, nearest
from coterie.evaluation import Evaluator
from coterie.inference.base import Engine
from coterie.models import LoRAModel
from coterie.modes.base import Mode
from coterie.monitor.console import Observer
from coterie.monitor.metrics import UpdateRecord, measure
from coterie.rollout.runner import Runner
from coterie.scenarios.base import Scenario, draw_tasks
from coterie.training.base import Learner, LearnerStats
from coterie.training.batch import build_batch
from coterie.types import Episode, FailedEpisode, Split, TrainingTask

LEARNED = ("loss", "entropy", "kl", "magnet_kl", "mismatch", "max_ratio", "grad_norm", "learning_rate", "tokens")
"""Fields of `StepStats` that are metrics."""

Rollout = asyncio.Future[tuple[list[Episode], list[FailedEpisode]]]
"""The episodes of one update, being played."""


class TaskQueue:
    """Training tasks in order: the user's own, over and over, or else the scenario's stream."""

    def __init__(self, scenario: Scenario, seed: int, start: int = 0) -> None:
        """`start`: tasks already taken, when a run goes on."""
        self.own: deque[TrainingTask] = deque()
        self._scenario, self._seed = scenario, seed
        self._stream: Iterator[TrainingTask] = islice(draw_tasks(scenario, Split.TRAIN, seed), start, None)

    def add(self, task: TrainingTask) -> None:
        self.own.append(task)

    def peek(self, count: int) -> list[TrainingTask]:
        """The first `count` training tasks of the run; none is taken."""
        return list(islice(self.own, count)) or list(islice(draw_tasks(self._scenario, Split.TRAIN, self._seed), count))

    def take(self, count: int) -> list[TrainingTask]:
        """The next `count` tasks. Raises `ScenarioError` when the scenario's training tasks end."""
        if self.own:
            taken = []
            for _ in range(count):
                taken.append(self.own[0])
                self.own.rotate(-1)
            return taken
        tasks = list(islice(self._stream, count))
        if len(tasks) < count:
            raise ScenarioError(
                f"the scenario gave {len(tasks)} training tasks where {count} were asked; it must not end"
            )
        return tasks


@dataclass(slots=True)
class TrainingLoop:
    """One run's loop over its parts."""

    config: RunConfig
    models: list[LoRAModel]
    mode: Mode
    credit: Credit
    engine: Engine
    learner: Learner
    runner: Runner
    tasks: TaskQueue
    evaluator: Evaluator
    observer: Observer
    keep: Callable[[int, Sequence[Episode], Sequence[FailedEpisode], UpdateRecord | None], None] | None = None
    """Writes an update to disk; without a record when too many of its episodes failed to learn from it."""
    save: Callable[[int], None] | None = None
    """Writes a checkpoint."""
    update: int = 0
    """Updates done."""
    concurrent: bool = False
    """Whether turns come from elsewhere, so that episodes are played while the learner works in a thread."""
    calls: Callable[[], Mapping[str, float]] | None = None
    """Figures of calls to servers."""
    stopping: bool = False
    records: list[UpdateRecord] = field(default_factory=list)
    _saved: int = field(init=False)
    """The update of the latest checkpoint, or the one the loop began with."""
    _until: int = field(init=False, default=0)
    """Updates that are wanted; no episode of a later one is begun."""
    _ahead: dict[int, Rollout] = field(init=False, default_factory=dict)
    """Episodes of later updates that are being played, by update; at most `inference.staleness` of them."""
    _untrained: dict[int, list[TrainingTask]] = field(init=False, default_factory=dict)
    """Tasks taken for updates whose episodes were given up."""
    _collector: RareCollections = field(init=False, default_factory=RareCollections)

    def __post_init__(self) -> None:
        self._saved = self.update

    async def run(self, until: int) -> bool:
        """Do updates until `until` are done. Returns False when it was asked to stop before.

        Raises what playing raises, after saving the updates done so far.
        """
        self._until = until
        with self._collector:
            try:
                return await self._run(until)
            finally:
                await self._give_up()

    async def announce(self) -> None:
        """Give the engine every model's current version, as it stands; what it has cached is dropped.

        Before anything is asked of a model that was trained by another process, because servers know none of its
        versions. And before every update: whatever was measured or played since the last one stays in the engine's
        cache, and what is cached changes which tokens are computed together; a resumed run starts empty, so every
        update does.
        """
        for model in self.models:
            await self.engine.publish(model.adapter, None)

    async def _run(self, until: int) -> bool:
        if self.update:
            await self.announce()
            if self._reached(await self._exact()):
                return True
        while self.update < until and not self.stopping:
            record = await self.step()
            if self.update % self.config.run.checkpoint_every == 0:
                self._save()
            if self._reached(record.metrics):
                self.observer.note(f"target reached after update {self.update}: {self.config.evaluation.until}")
                until = self.update
        self._save()
        return self.update >= until

    async def step(self) -> UpdateRecord:
        """One update of every policy."""
        number = self.update + 1
        started = time.perf_counter()
        if not self._ahead:
            await self.announce()
        try:
            with self.learner.listening():
                playing = self._ahead.pop(number) if number in self._ahead else self._play(number)
                episodes, failed = await playing
            self._check_failures(number, episodes, failed)
        except CoterieError:  # nothing of this update was learned yet
            self._save()
            raise
        played = time.perf_counter()
        self._look_ahead(number)

        advantages = self.credit.advantages(episodes)
        policies = [model.model_id for model in self.models]
        batch = build_batch(policies, episodes, advantages, keep_zero=self.learner.keep_zero)
        # servers are listened to while the learner works; inside the process there is nothing to wait for, and a
        # thread would only cost
        step = partial(self.learner.step, batch, number)
        stats = await asyncio.to_thread(step) if self.concurrent else step()
        learned = time.perf_counter()

        self.mode.observe(episodes)
        await self._publish(stats)
        self.update = number
        return await self._record(number, episodes, failed, stats, (started, played, learned))

    def _play(self, number: int) -> Rollout:
        """Begin to play the episodes of update `number`, under the versions that are current now."""
        rollout = self.config.rollout
        tasks = self._untrained.pop(number, None) or self.tasks.take(rollout.tasks_per_update)
        self._untrained[number] = tasks
        return asyncio.ensure_future(
            self.runner.groups(
                tasks,
                self.models,
                update=number,
                group_size=rollout.group_size,
                withhold=rollout.withhold,
                rotate=rollout.rotate_seats,
            )
        )

    def _look_ahead(self, number: int) -> None:
        """Begin the episodes of the updates after `number`, as far as their versions may lag behind the learner.

        What is begun during update n is trained in update n + staleness at the latest, when the learner is staleness
        versions further; which versions play which update depends on the numbers alone, not on the clock.
        """
        del self._untrained[number]
        for later in range(number + 1, min(number + self.config.inference.staleness, self._until) + 1):
            if later not in self._ahead and not self.stopping:
                self._ahead[later] = self._play(later)

    async def _give_up(self) -> None:
        """Stop episodes nobody waits for any more; their tasks are kept for when the loop goes on."""
        given_up, self._ahead = list(self._ahead.values()), {}
        for playing in given_up:
            playing.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)

    async def _publish(self, stats: LearnerStats) -> None:
        for model in self.models:
            if stats.policies[model.model_id].stepped:
                model.version += 1
                model.adapter_dir = None
                model.weight_updates += self.config.learner.passes
                model.lora_adaptations += 1
                await self.engine.publish(model.adapter, None)

    async def _record(
        self,
        number: int,
        episodes: Sequence[Episode],
        failed: Sequence[FailedEpisode],
        stats: LearnerStats,
        times: tuple[float, float, float],
    ) -> UpdateRecord:
        metrics, performances = measure(number, episodes, failed, self.models)
        for model_id, s in stats.policies.items():
            for stat in LEARNED:
                metrics[f"learn/{model_id}/{stat}"] = float(getattr(s, stat))
        if self.calls is not None:
            metrics.update(self.calls())
        metrics["learn/packed_tokens"] = float(stats.packed_tokens)
        metrics["learn/recalled_tokens"] = float(stats.recalled_tokens)
        metrics["learn/naive_tokens"] = float(stats.naive_tokens)
        every = self.config.evaluation.every
        if every and number % every == 0:
            metrics.update(await self._exact())
        for model in self.models:
            model.performance_history.extend(p for p in performances if p.model_id == model.model_id)
        started, played, learned = times
        seconds = {"rollout": played - started, "learn": learned - played, "total": time.perf_counter() - started}
        record = UpdateRecord(number, max(number, self.config.updates), metrics, performances, seconds)
        self.records.append(record)
        if self.keep is not None:
            self.keep(number, episodes, failed, record)
        self.observer.update(record)
        return record

    def _save(self) -> None:
        if self.save is not None and self._saved != self.update:
            self.save(self.update)
            self._saved = self.update

    async def _exact(self) -> dict[str, float]:
        """The scenario's exact metrics by their full names; nothing where the config does not ask for them."""
        if not self.config.evaluation.every:
            return {}
        return {f"exact/{name}": value for name, value in (await self.evaluator.exact()).items()}

    def _reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether every target is met. Raises `ConfigError` for a target the scenario does not measure."""
        until = self.config.evaluation.until
        known = {name.removeprefix("exact/") for name in metrics if name.startswith("exact/")}
        if not until or not known:
            return False
        for name in until:
            if name not in known:
                raise ConfigError(f"evaluation.until: no exact metric {name!r} here{nearest(name, known)}")
        return all(metrics[f"exact/{name}"] >= value for name, value in until.items())

    def _check_failures(self, number: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode]) -> None:
        total = len(episodes) + len(failed)
        if len(failed) > self.config.rollout.max_failed_share * total:
            if self.keep is not None:
                self.keep(number, episodes, failed, None)
            causes: dict[str, int] = {}
            for failure in failed:
                causes[failure.error] = causes.get(failure.error, 0) + 1
            listed = "; ".join(
                f"{count} times: {cause}" for cause, count in sorted(causes.items(), key=lambda c: -c[1])[:3]
            )
            raise ScenarioError(
                f"update {number}: {len(failed)} of {total} episodes failed, more than rollout.max_failed_share "
                f"({self.config.rollout.max_failed_share}) allows. {listed}"
                + ("; all are in the run's database, table failures" if self.keep is not None else "")
            )
