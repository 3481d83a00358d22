"""The user's task queue: advice, answers, and a check of every answer.

    those who advise speak -> everyone else answers, hearing what mode and roles let through -> scores

What a leader decides under central leadership is its own answer, and its advice; followers answer after hearing it.
Where no leader is present each seat gives advice and then decides alone. In collaboration tasks everyone who is heard
tells what it knows, leader or not, because the answer is split between the seats.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

from pydantic import Field, field_validator

from coterie.prompts.loader import text
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.scenarios.tasks.content import check_content
from coterie.scenarios.tasks.kinds import KINDS, Kind
from coterie.scenarios.teamwork import advice_speakers, heard_by, response_quality, team_scores
from coterie.types import (
    ADVICE,
    DECISION,
    Observation,
    Outcome,
    PlayerCard,
    Seat,
    SeatId,
    Split,
    Strategy,
    TaskType,
    TrainingTask,
    Turn,
)

_FILE = "tasks"
_CHOICE_BUDGET = 12
"""Tokens a seat may spend on a choice answer and its advice before efficiency falls to one half."""
_LENGTH = {"en": 1, "zh": 3}
"""Tokens of free text by language, in those of the same text in English: the embedded model's vocabulary has whole
English words, but takes two or three tokens for most Chinese characters."""


class TasksOptions(ScenarioOptions):
    """Which tasks the queue holds."""

    types: tuple[TaskType, ...] = Field(default=tuple(TaskType), min_length=1)
    """Training tasks take these in turn; a type named twice comes twice as often. Held-out tasks have each alike."""
    difficulty: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest; drawn evenly between them."""
    cooperation_level: float = Field(default=0.8, ge=0, le=1)
    models: int = Field(default=3, ge=1, le=32)
    """Seats of a task (its required_models)."""
    reward_pool: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=4, ge=1)
    keyword_bonus: bool = False
    """Add the keyword bonus of an answer's text to its score. Off, because a policy learns to chant the words."""
    heldout: int = Field(default=1000, ge=1)
    """How many held-out tasks there are."""

    @field_validator("difficulty")
    @classmethod
    def _within(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("give the lowest and the highest, within 0..1")
        return value


class Tasks:
    """The `tasks` scenario."""

    Options: ClassVar[type[ScenarioOptions]] = TasksOptions

    def __init__(self, options: TasksOptions) -> None:
        self.options = options

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Tasks of the chosen types in turn, each drawn from its own generator."""
        o = self.options
        types = o.types if split is Split.TRAIN else tuple(dict.fromkeys(o.types))
        number = 0
        while split is Split.TRAIN or number < o.heldout:
            rng = random.Random(f"{seed}/{split}/{number}")
            task_type = types[number % len(types)]
            difficulty = round(rng.uniform(*o.difficulty), 3)
            yield TrainingTask(
                task_id=f"{split}-{number}-{task_type}",
                task_type=task_type,
                difficulty=difficulty,
                reward_pool=o.reward_pool,
                max_steps=o.max_steps,
                required_models=o.models,
                cooperation_level=o.cooperation_level,
                content=KINDS[task_type].make(rng, difficulty, split, o.models),
                split=split,
            )
            number += 1

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(f"seat_{i + 1}") for i in range(task.required_models)]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that its type cannot be played with; a task may have none."""
        if task.content:
            check_content(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        self.check_task(task)
        kind = KINDS[task.task_type]
        content = task.content or _own_content(task)
        game = _Game(kind, content, table)
        advice, decided = await game.advise()
        waiting = [seat for seat in table.seats if seat not in decided]
        turns = await asyncio.gather(*(game.answer(seat, advice) for seat in waiting))
        decided.update(zip(waiting, turns, strict=True))
        accuracy = {seat: game.accuracy(decided[seat]) for seat in table.seats}
        scores = team_scores(table, accuracy, game.tokens, game.budget())
        if self.options.keyword_bonus:
            scores = {seat: min(1.0, score + response_quality(decided[seat].text)) for seat, score in scores.items()}
        return Outcome(scores, accuracy)


class _Game:
    """One task at one table."""

    def __init__(self, kind: Kind, content: Mapping[str, object], table: Table) -> None:
        self.kind, self.content, self.table = kind, content, table
        self.language = table.language
        self.number = {seat: i for i, seat in enumerate(table.seats)}
        self.choices = kind.choices(content, self.language)
        self.tokens: dict[SeatId, int] = dict.fromkeys(table.seats, 0)
        self.max_tokens = kind.max_tokens * _LENGTH[self.language]

    async def advise(self) -> tuple[dict[SeatId, str], dict[SeatId, Turn]]:
        """What each speaker advised, and the answers that were decided by speaking. Speakers do not hear each other."""
        table = self.table
        speakers = advice_speakers(table)
        if self.kind.everyone_advises and table.strategy.communication and table.task.max_steps >= 2:
            speakers = [s for s in table.seats if any(table.hears(o, s) for o in table.seats if o != s)]
        turns = await asyncio.gather(*(self._advice(seat) for seat in speakers))
        advice = {seat: turn.text for seat, turn in zip(speakers, turns, strict=True)}
        decided = {seat: turn for seat, turn in zip(speakers, turns, strict=True) if turn.kind == DECISION}
        return advice, decided

    async def _advice(self, seat: SeatId) -> Turn:
        own = self.kind.advice(self.content, self.language, self.number[seat])
        if own is None:
            central = self.table.strategy.leadership == "central"
            question = self.kind.question(self.content, self.language, self.number[seat])
            return await self._act(seat, question, {}, self.choices, DECISION if central else ADVICE)
        question, choices = own
        return await self._act(seat, question, {}, choices, ADVICE)

    async def answer(self, seat: SeatId, advice: Mapping[SeatId, str]) -> Turn:
        question = self.kind.question(self.content, self.language, self.number[seat])
        return await self._act(seat, question, advice, self.choices, "answer")

    async def _act(
        self, seat: SeatId, question: str, advice: Mapping[SeatId, str], choices: Sequence[str] | None, kind: str
    ) -> Turn:
        table, card = self.table, self.table[seat].card
        heard = tuple(
            (table[speaker].card.model_id or speaker, said) for speaker, said in heard_by(table, seat, advice)
        )
        observation = Observation(
            user=question + ("\n" + _heard(self.language, heard) if heard else ""),
            system=_system(self.language, card, table.strategy, len(table.seats) - 1),
            prefix=text(self.language, _FILE, "advice" if kind == ADVICE else "answer") if choices else "",
        )
        turn = await table[seat].act(observation, choices=choices, max_tokens=self.max_tokens, kind=kind)
        self.tokens[seat] += len(turn.token_ids)
        return turn

    def accuracy(self, turn: Turn) -> float:
        return self.kind.accuracy(self.content, self.language, turn.text, turn.valid)

    def budget(self) -> int:
        return _CHOICE_BUDGET if self.choices is not None else _CHOICE_BUDGET + self.max_tokens


@lru_cache(maxsize=4096)
def _system(language: str, card: PlayerCard, strategy: Strategy, others: int) -> str:
    level = "low" if strategy.teamwork <= 0.3 else "medium" if strategy.teamwork <= 0.7 else "high"
    return text(
        language, _FILE, "system", role=str(card.role), team=card.team, specialization=card.specialization,
        others=others, mode=str(strategy.mode), teamwork=level, communication=strategy.communication,
        resource_sharing=strategy.resource_sharing,
    ).replace("\n", "")  # fmt: skip


@lru_cache(maxsize=65536)
def _heard(language: str, advice: tuple[tuple[str, str], ...]) -> str:
    return text(language, _FILE, "heard", advice=advice)


@lru_cache(maxsize=4096)
def _made(task_id: str, task_type: TaskType, difficulty: float, split: Split, seats: int) -> Mapping[str, object]:
    return KINDS[task_type].make(random.Random(f"own/{task_id}"), difficulty, split, seats)


def _own_content(task: TrainingTask) -> Mapping[str, object]:
    """Content of a user's task that brings none: from its id, so that the same task is always the same."""
    return _made(task.task_id, task.task_type, task.difficulty, task.split, task.required_models)
