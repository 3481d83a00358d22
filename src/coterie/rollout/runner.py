"""Playing many episodes at once.

Every episode of an update is a coroutine; the engine batches whatever they ask at the same time. An episode that
raises becomes a `FailedEpisode` with its cause, and the others go on; only an engine that is broken ends them all.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.errors import EngineError, RequestError, ScenarioError
from coterie.models import LoRAModel
from coterie.rollout.matchmaking import assign, frozen_as
from coterie.rollout.table import EpisodeTable, Holder, TableServices, stable_seed
from coterie.scenarios.base import Scenario
from coterie.types import (
    Episode,
    FailedEpisode,
    ModelRole,
    Outcome,
    SeatId,
    Strategy,
    TeamId,
    TrainingTask,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode to be played."""

    task: TrainingTask
    holders: Mapping[SeatId, Holder]
    episode_id: str
    group: str
    update: int
    withhold: float = 0.0


class Runner:
    """Plays a scenario with what `services` offer."""

    def __init__(self, scenario: Scenario, services: TableServices) -> None:
        self.scenario = scenario
        self.services = services

    def seating(self, task: TrainingTask, models: Sequence[LoRAModel], turn: int, rotate: bool) -> dict[SeatId, Holder]:
        """Who sits where when `task` is played for the `turn`-th time."""
        return assign(self.scenario.seats(task), models, turn=turn, rotate=rotate)

    async def groups(
        self,
        tasks: Sequence[TrainingTask],
        models: Sequence[LoRAModel],
        *,
        update: int,
        group_size: int,
        withhold: float = 0.0,
        rotate: bool = False,
    ) -> tuple[list[Episode], list[FailedEpisode]]:
        """Play `group_size` episodes of each task.

        With `rotate`, the two halves of a group are played with the models moved on by one seat each (or more halves,
        for more models): siblings that credit compares always have the same seating.
        """
        plans = []
        for number, task in enumerate(tasks):
            turn = update * len(tasks) + number
            shifts = len(models) if rotate else 1
            seatings = [self.seating(task, models, turn + shift, rotate) for shift in range(min(shifts, group_size))]
            for k in range(group_size):
                group = f"{update}.{number}" + (f".{k % shifts}" if rotate else "")
                plans.append(Plan(task, seatings[k % shifts], f"{update}.{number}.{k}", group, update, withhold))
        return await self.play(plans)

    async def play(self, plans: Sequence[Plan]) -> tuple[list[Episode], list[FailedEpisode]]:
        """Play all plans concurrently; results are in the order of `plans`."""
        results = await asyncio.gather(*(self._guarded(plan) for plan in plans))
        episodes = [r for r in results if isinstance(r, Episode)]
        failed = [r for r in results if isinstance(r, FailedEpisode)]
        return episodes, failed

    async def _guarded(self, plan: Plan) -> Episode | FailedEpisode:
        try:
            return await self.one(plan)
        except Exception as error:
            # a scenario is foreign code, and what it asks may be refused: its failure is recorded, not fatal
            if isinstance(error, EngineError) and not isinstance(error, RequestError):
                raise  # a broken engine fails every episode
            return FailedEpisode(plan.episode_id, plan.task, f"{type(error).__name__}: {error}")

    async def calibrate(self, tasks: Sequence[TrainingTask], models: Sequence[LoRAModel], rotate: bool) -> int:
        """Find the biases of choices from these tasks, played by the bare base in the seats of `models`.

        Returns how many choice sets got one. The engine is left with nothing cached.
        """
        services = self.services
        base = {model.model_id: None for model in models}
        plans = []
        for number, task in enumerate(tasks):
            holders = frozen_as(self.seating(task, models, number, rotate), base)
            plans.append(Plan(task, holders, f"calibrate.{number}", "calibrate", 0))
        services.calibration.recording = True
        await self.play(plans)
        services.calibration.recording = False
        stops = services.chat.stop_ids
        count = await services.calibration.fit(services.engine, stops[0] if stops else None)
        for model in models:
            await services.engine.publish(model.adapter, None)
        return count

    def table(self, plan: Plan) -> EpisodeTable:
        """The table of one episode."""
        cards = [holder.card for holder in plan.holders.values()]
        mode = self.services.mode.name
        strategy = Strategy.of(plan.task, mode, any(card.role is ModelRole.LEADER for card in cards))
        withheld: frozenset[SeatId] = frozenset()
        if plan.withhold > 0 and strategy.communication:
            withheld = frozenset(
                card.seat_id
                for card in cards
                if stable_seed(self.services.seed, plan.episode_id, "withheld", card.seat_id) / 2**64 < plan.withhold
                and any(other is not card and self.services.mode.hears(other, card, plan.task) for other in cards)
            )
        return EpisodeTable(self.services, plan.task, plan.holders, strategy, plan.episode_id, withheld)

    async def one(self, plan: Plan) -> Episode:
        """Play one episode. Raises what the scenario raises, and `ScenarioError` for a broken outcome."""
        table = self.table(plan)
        outcome = await self.scenario.play(plan.task, table)
        check_outcome(outcome, table.seats)
        teams: dict[SeatId, TeamId | None] = {s: h.card.team for s, h in plan.holders.items()}
        rewards = self.services.mode.rewards(plan.task, outcome.scores, teams)
        turns = table.turns()
        return Episode(
            episode_id=plan.episode_id,
            task=plan.task,
            group=plan.group,
            trajectories={
                seat: Trajectory(seat, holder.card.model_id, holder.card.team, turns[seat])
                for seat, holder in plan.holders.items()
            },
            outcome=outcome,
            rewards=rewards,
            withheld=table.withheld,
            update=plan.update,
        )


def check_outcome(outcome: Outcome, seats: Sequence[SeatId]) -> None:
    """Raise `ScenarioError` unless every seat has a finite score in [0, 1] and accuracies are of known seats."""
    if set(outcome.scores) != set(seats):
        raise ScenarioError(f"outcome scores seats {sorted(outcome.scores)}, but the table has {sorted(seats)}")
    for what, values in (("score", outcome.scores), ("accuracy", outcome.accuracy)):
        for seat, value in values.items():
            if seat not in seats:
                raise ScenarioError(f"outcome has {what} for unknown seat {seat!r}")
            if not (math.isfinite(value) and -1e-9 <= value <= 1 + 1e-9):
                raise ScenarioError(f"{what} of seat {seat!r} is {value}, outside [0, 1]")


def with_services(runner: Runner, **changes: object) -> Runner:
    """The same runner with some services replaced (another temperature, no calibration, a person to ask)."""
    return Runner(runner.scenario, replace(runner.services, **changes))  # type: ignore[arg-type]
