"""Asking seats: what several scenarios do with the answers.

A scenario that cannot go on without a choice takes `chosen`; exact evaluation asks for many distributions at once, so
that the engine computes them together (`distributions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from coterie.errors import ScenarioError
from coterie.scenarios.base import Table
from coterie.types import Observation, SeatId, Turn

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Question:
    """What a seat is shown, and what it may answer."""

    seat: SeatId
    shown: Observation
    choices: tuple[str, ...]


def chosen(turn: Turn) -> int:
    """The index of the choice a seat took. Raises `ScenarioError` for an answer that is none of its choices."""
    if turn.choice is None:
        raise ScenarioError(f"seat {turn.seat_id!r} answered {turn.text!r}, which is none of its choices")
    return turn.choice


async def choose(table: Table, questions: Sequence[Question], kind: str) -> list[int]:
    """Every question put to its seat at the same time: the index of each answer, in the order of the questions.

    Raises:
        ScenarioError: an answer is none of the choices.
    """
    return list(await asyncio.gather(*(ask(table, question, kind) for question in questions)))


async def ask(table: Table, question: Question, kind: str) -> int:
    """One question put to its seat: the index of its answer. Raises as `choose` does, and makes no task of it."""
    return chosen(await table[question.seat].act(question.shown, choices=question.choices, kind=kind))


async def distributions(table: Table, questions: Mapping[Key, Question]) -> dict[Key, tuple[float, ...]]:
    """The exact probabilities of the choices of every question; equal questions are asked once."""
    distinct = list(dict.fromkeys(questions.values()))
    answers = await asyncio.gather(*(table[q.seat].distribution(q.shown, q.choices) for q in distinct))
    found = dict(zip(distinct, answers, strict=True))
    return {key: found[question] for key, question in questions.items()}
