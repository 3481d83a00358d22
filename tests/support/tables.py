"""Playing scenarios at practice tables in tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coterie.scenarios.base import ExactlyMeasured, Scenario
from coterie.scenarios.practice import Answer, PracticeTable
from coterie.types import ModelRole, Observation, Outcome, PlayerCard, Seat, SeatId, Split, TrainingTask


def first_task(scenario: Scenario, split: Split = Split.TRAIN, seed: int = 0) -> TrainingTask:
    return next(iter(scenario.tasks(split, seed)))


def make_task(**changes: Any) -> TrainingTask:
    return TrainingTask(**{"task_id": "t", "task_type": "collaboration", "max_steps": 2, **changes})


def make_table(task: TrainingTask, seats: Sequence[SeatId], **options: Any) -> PracticeTable:
    """A table with seats of these names."""
    return PracticeTable(task, [Seat(seat) for seat in seats], **options)


def cards(roles: Mapping[SeatId, ModelRole | str], teams: Mapping[SeatId, str] | None = None) -> list[PlayerCard]:
    return [PlayerCard(seat, None, ModelRole(role), (teams or {}).get(seat)) for seat, role in roles.items()]


def play(scenario: Scenario, task: TrainingTask | None = None, **options: Any) -> tuple[Outcome, PracticeTable]:
    """Play one episode; `options` are those of `PracticeTable`."""
    task = first_task(scenario) if task is None else task
    table = PracticeTable(task, scenario.seats(task), **options)
    return asyncio.run(scenario.play(task, table)), table


def exact(scenario: Scenario, **options: Any) -> Mapping[str, float]:
    assert isinstance(scenario, ExactlyMeasured)
    task = first_task(scenario)
    return asyncio.run(scenario.exact(PracticeTable(task, scenario.seats(task), **options)))


def saying(texts: Mapping[SeatId, str | Sequence[str]]) -> Answer:
    """Each seat says its text, or its texts in turn."""
    queues = {seat: iter([text] if isinstance(text, str) else text) for seat, text in texts.items()}

    def answer(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        return next(queues[seat])

    return answer


def shown_to(table: PracticeTable, seats: Collection[SeatId]) -> list[str]:
    """User texts of all turns of these seats."""
    return [seen.user for seat in table.seats if seat in seats for seen in table[seat].shown]
