"""Measuring policies on held-out tasks, and exactly where a scenario can.

The same held-out tasks are played (greedily, unless a temperature is set) by the bare base model, by the base with
calibrated choices, and by the trained policies under the same calibration; so the table separates what calibration
gives from what training gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from coterie.errors import CoterieError, ScenarioError, cause
from coterie.models import LoRAModel
from coterie.monitor.metrics import simulated_share
from coterie.monitor.tables import ResultTable
from coterie.rollout.calibration import Calibration
from coterie.rollout.matchmaking import frozen_as
from coterie.rollout.runner import Plan, Runner, with_services
from coterie.scenarios.base import ExactlyMeasured, draw_tasks, shares_tasks
from coterie.types import Episode, FailedEpisode, ModelId, Split, TrainingTask

PLAYERS = ("bare base", "calibrated base", "trained")
_CHUNK = 32
"""Episodes played at once, so that progress is seen."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean held-out accuracy of one kind of player, by task type and model (scores where nothing is right)."""

    by_cell: Mapping[tuple[str, ModelId], float]
    by_model: Mapping[ModelId, float]
    mean: float
    """Over all models and tasks."""
    exact: Mapping[str, float]
    outcome: Mapping[str, float]
    failed: int = 0
    """Held-out episodes that failed and are in none of the figures."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All three kinds of player on the same tasks."""

    tasks: int
    measured: Mapping[str, Measured]
    simulated: float = 0.0
    """Share of turns that nothing generated; above 0 the figures say nothing of any model."""
    novel: bool = True
    """Whether training had none of these tasks."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, for results/ and the documentation's tables."""
        return {
            "tasks": self.tasks,
            **({"simulated": self.simulated} if self.simulated else {}),
            "players": {
                player: {
                    "mean": m.mean,
                    "by_model": dict(m.by_model),
                    "by_task_type": _nested(m.by_cell),
                    "exact": dict(m.exact),
                    "outcome": dict(m.outcome),
                    **({"failed": m.failed} if m.failed else {}),
                }
                for player, m in self.measured.items()
            },
        }

    def table(self) -> ResultTable:
        """Rows: task type and model; columns: the three players and the gain over the bare base."""
        players = [p for p in PLAYERS if p in self.measured]
        rows: list[tuple[str | float, ...]] = []
        for cell in self.measured[players[0]].by_cell:
            values = [self.measured[p].by_cell.get(cell, 0.0) for p in players]
            rows.append((*cell, *values, values[-1] - values[0]))
        if rows:
            means = [self.measured[p].mean for p in players]
            rows.append(("all", "mean of all models", *means, means[-1] - means[0]))
        for name in self.measured[players[0]].exact:
            values = [self.measured[p].exact[name] for p in players]
            rows.append(("exact", name, *values, values[-1] - values[0]))
        warned = f"SIMULATED RESPONSES ({self.simulated:.0%} of turns), of no model: " if self.simulated else ""
        failed = max(m.failed for m in self.measured.values())
        what, which = ("Held-out accuracy", "no training step saw") if self.novel else ("Accuracy", "training has too")
        count = "1 task" if self.tasks == 1 else f"{self.tasks} tasks"
        left_out = f" (up to {failed} failed and are left out)" if failed else ""
        return ResultTable(
            f"{warned}{what} on {count} {which}{left_out}",
            ("task type", "model", *players, "gain"),
            tuple(rows),
        )


def _nested(cells: Mapping[tuple[str, ModelId], float]) -> dict[str, dict[ModelId, float]]:
    out: dict[str, dict[ModelId, float]] = {}
    for (task_type, model_id), value in cells.items():
        out.setdefault(task_type, {})[model_id] = value
    return out


class Evaluator:
    """Evaluates the models of a run."""

    def __init__(
        self,
        runner: Runner,
        models: Sequence[LoRAModel],
        seed: int,
        rotate: bool,
        max_failed_share: float = 0.0,
        temperature: float = 0.0,
    ) -> None:
        """`max_failed_share`: of the held-out tasks that may fail; they are left out and counted. `temperature`: of
        held-out play, 0 for greedy."""
        self.runner = runner
        self.models = models
        self.seed = seed
        self.rotate = rotate
        self.max_failed_share = max_failed_share
        self.temperature = temperature

    async def all(self, count: int, split: Split, report: Report) -> Evaluation:
        """Measure the bare base, the calibrated base and the trained policies on the same `count` tasks."""
        tasks = list(islice(draw_tasks(self.runner.scenario, split, self.seed), count))
        measured, simulated = {}, []
        for number, player in enumerate(PLAYERS):

            def step(done: int, number: int = number, player: str = player) -> None:
                report(f"evaluating {player}", number * len(tasks) + done, len(PLAYERS) * len(tasks))

            measured[player], share = await self.one(player, tasks, step)
            simulated.append(share)
        novel = split is Split.HELDOUT and not shares_tasks(self.runner.scenario)
        return Evaluation(len(tasks), measured, sum(simulated) / len(simulated), novel)

    async def one(
        self, player: str, tasks: Sequence[TrainingTask], step: Callable[[int], None]
    ) -> tuple[Measured, float]:
        """Measure one kind of player; also the share of its turns that were simulated."""
        changes: dict[str, Any] = {"temperature": self.temperature}
        if player == "bare base":
            changes["calibration"] = Calibration()
        runner = with_services(self.runner, **changes)
        base = {m.model_id: None for m in self.models} if player != "trained" else {}
        plans = []
        episodes: list[Episode] = []
        failed: list[FailedEpisode] = []
        for number, task in enumerate(tasks):
            try:
                holders = frozen_as(runner.seating(task, self.models, number, self.rotate), base)
            except ScenarioError as error:
                failed.append(FailedEpisode(f"eval.{number}", task, cause(error)))
                continue
            plans.append(Plan(task, holders, f"eval.{number}", f"eval.{number}", 0))
        self._check_failures(failed, len(tasks))
        for start in range(0, len(plans), _CHUNK):
            played, broken = await runner.play(plans[start : start + _CHUNK])
            episodes.extend(played)
            failed.extend(broken)
            self._check_failures(failed, len(tasks))
            step(len(episodes) + len(failed))
        return _measure(episodes, await self.exact(runner, base), len(failed)), simulated_share(episodes)

    def _check_failures(self, failed: Sequence[FailedEpisode], total: int) -> None:
        if len(failed) > self.max_failed_share * total:
            raise ScenarioError(
                f"held-out task {failed[0].task.task_id!r} failed: {failed[0].error}; {len(failed)} of {total} failed, "
                f"more than rollout.max_failed_share ({self.max_failed_share}) allows"
            )

    async def exact(self, runner: Runner | None = None, base: Mapping[ModelId, None] | None = None) -> dict[str, float]:
        """The scenario's exact metrics for the current policies (or the base); empty when it has none.

        Raises:
            ScenarioError: it raises, or a figure is not a finite number.
        """
        runner = runner or self.runner
        scenario = runner.scenario
        if not isinstance(scenario, ExactlyMeasured):
            return {}
        task = next(iter(scenario.tasks(Split.HELDOUT, self.seed)))
        holders = frozen_as(runner.seating(task, self.models, 0, self.rotate), base or {})
        try:
            found = dict(await scenario.exact(runner.table(Plan(task, holders, "exact", "exact", 0))))
        except CoterieError:
            raise
        except Exception as error:
            raise ScenarioError(f"exact raised {cause(error)}") from error
        odd = [name for name, value in found.items() if not (isinstance(value, int | float) and math.isfinite(value))]
        if odd:
            raise ScenarioError(f"exact figure {odd[0]!r} is {found[odd[0]]!r}; it must be a finite number")
        return found


def _measure(episodes: Iterable[Episode], exact: Mapping[str, float], failed: int) -> Measured:
    cells: dict[tuple[str, ModelId], list[float]] = {}
    models: dict[ModelId, list[float]] = {}
    outcome: dict[str, list[float]] = {}
    for episode in episodes:
        for seat_id, trajectory in episode.trajectories.items():
            if trajectory.model_id is None:
                continue
            value = episode.outcome.accuracy.get(seat_id, episode.outcome.scores[seat_id])
            cells.setdefault((str(episode.task.task_type), trajectory.model_id), []).append(value)
            models.setdefault(trajectory.model_id, []).append(value)
        for name, value in episode.outcome.metrics.items():
            outcome.setdefault(name, []).append(value)
    every = [value for values in models.values() for value in values]
    return Measured(
        {cell: sum(v) / len(v) for cell, v in sorted(cells.items())},
        {model_id: sum(v) / len(v) for model_id, v in models.items()},
        sum(every) / len(every) if every else 0.0,
        exact,
        {name: sum(v) / len(v) for name, v in outcome.items()},
        failed,
    )
