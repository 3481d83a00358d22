"""Games of one word: in every team a speaker is shown a target and says one word, and its listener names a target.

    each round: target -> speaker of every team says a word -> its listener names a target
    a round is a point for a team if its listener is right and nothing spoils it
    score of a seat = points of its team by rounds;  the team with more points wins the game

The rounds of a game have targets drawn independently, all alike, by the task, and the same for all teams. What words
and targets are, and what spoils a point, is said by the game that derives from `Relay`: `team_signaling`, `taboo`.
Rounds are independent and every prompt is the same in all of them, so `exact` needs the speakers' probabilities for
every target and the listeners' for every word, and nothing is sampled.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.scenarios.contests import SIDES, Odds, by_seat, figures, odds, won
from coterie.scenarios.signaling import mutual_information_bits
from coterie.types import Seat, SeatId, Split, TaskType, TrainingTask

HELDOUT_TASKS = 32
"""Games in the held-out split."""

Rows = Sequence[Sequence[float]]


class RelayOptions(ScenarioOptions):
    """Settings all these games share."""

    rounds: int = Field(default=3, ge=1, le=20)
    """Targets in a game."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""


@dataclass(frozen=True, slots=True)
class Point:
    """What became of one round for one team."""

    word: int
    """What the speaker said."""
    right: bool
    """Whether the listener named the target."""
    spoiled: bool

    @property
    def counts(self) -> bool:
        return self.right and not self.spoiled


class Relay(ABC):
    """The rules the games share. Two teams by default: seats "<side>_<speaker>" and "<side>_<listener>"."""

    single_task = True
    id: ClassVar[str]
    speaker: ClassVar[str] = "speaker"
    listener: ClassVar[str] = "listener"
    sides: Sequence[str] = SIDES

    def __init__(self, options: RelayOptions, targets: int, words: int) -> None:
        self.relay = options
        self.targets = targets
        self.words = words

    # -- what a game says -----------------------------------------------------------------------------------------

    @abstractmethod
    def says(self, side: str, target: int, language: str) -> Question:
        """What the speaker of `side` is asked; its choices are words, `said` turns a choice into a word."""

    @abstractmethod
    def names(self, side: str, word: int, language: str) -> Question:
        """What the listener of `side` is asked after a word; its choices are the targets."""

    def said(self, target: int, choice: int) -> int:
        """The word that is this choice of a speaker shown `target`."""
        return choice

    def spoils(self, target: int, word: int) -> bool:
        """Whether this word may not be said of this target."""
        return False

    # -- playing --------------------------------------------------------------------------------------------------

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Games of independently drawn targets: endlessly for TRAIN, `HELDOUT_TASKS` for HELDOUT."""
        rng = random.Random(f"{self.id}:{split}:{seed}")
        number = 0
        while split is Split.TRAIN or number < HELDOUT_TASKS:
            targets = [rng.randrange(self.targets) for _ in range(self.relay.rounds)]
            yield TrainingTask(
                task_id="-".join([self.id, *map(str, targets)]),
                task_type=TaskType.COLLABORATION,
                difficulty=min(1.0, math.log2(self.targets) / 4),
                reward_pool=self.relay.reward_pool,
                max_steps=self.steps,
                required_models=2 * len(self.sides),
                cooperation_level=self.relay.cooperation_level,
                content={"targets": targets},
                split=split,
            )
            number += 1

    @property
    def steps(self) -> int:
        """Most turns of a seat."""
        return self.relay.rounds

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(self.seat(side, role)) for side in self.sides for role in (self.speaker, self.listener)]

    def seat(self, side: str, role: str) -> SeatId:
        return f"{side}_{role}"

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for targets that are not `rounds` numbers of targets; a task may have no content."""
        self.targets_of(task)

    def targets_of(self, task: TrainingTask) -> list[int]:
        """The targets of a game; those of a task without content follow from its id."""
        if not task.content:
            rng = random.Random(hashlib.sha256(task.task_id.encode()).hexdigest())
            return [rng.randrange(self.targets) for _ in range(self.relay.rounds)]
        targets = task.content.get("targets")
        fits = isinstance(targets, list | tuple) and len(targets) == self.relay.rounds
        if not fits or not all(type(t) is int and 0 <= t < self.targets for t in targets or ()):
            raise ScenarioError(
                f"task {task.task_id!r}: content['targets'] is {targets!r}; it must be a list of {self.relay.rounds} "
                f"numbers 0..{self.targets - 1}"
            )
        return list(targets or ())

    async def rounds(self, task: TrainingTask, table: Table) -> list[dict[str, Point]]:
        """Play every round of a game, target by target: what became of it, by side."""
        return [await self.round(target, table) for target in self.targets_of(task)]

    async def round(self, target: int, table: Table) -> dict[str, Point]:
        """One target, all sides at the same time."""
        asked = [self.says(side, target, table.language) for side in self.sides]
        words = [self.said(target, choice) for choice in await choose(table, asked, "word")]
        heard = [self.names(side, word, table.language) for side, word in zip(self.sides, words, strict=True)]
        named, stolen = await asyncio.gather(choose(table, heard, "guess"), self.intercepted(target, words, table))
        return {
            side: Point(word, guess == target, self.spoils(target, word) or side in stolen)
            for side, word, guess in zip(self.sides, words, named, strict=True)
        }

    async def intercepted(self, target: int, words: Sequence[int], table: Table) -> set[str]:
        """The sides whose word another side understood."""
        return set()

    def scores(self, table: Table, rounds: Sequence[Mapping[str, Point]]) -> dict[SeatId, float]:
        """Of every seat: its side's points by rounds."""
        return by_seat(table.seats, self.points(rounds))

    def points(self, rounds: Sequence[Mapping[str, Point]]) -> dict[str, float]:
        """Share of the rounds that count for each side."""
        return {side: sum(points[side].counts for points in rounds) / len(rounds) for side in self.sides}

    def game(self, rounds: Sequence[Mapping[str, Point]]) -> dict[str, float]:
        """The metrics of a game that is over: each side's success, and who won."""
        points = self.points(rounds)
        found = {f"{side}_success": points[side] for side in self.sides}
        found["success"] = math.fsum(points.values()) / len(points)
        return {**found, **(figures(won(points["red"], points["blue"])) if len(points) > 1 else {})}

    # -- exactly --------------------------------------------------------------------------------------------------

    async def asked(self, table: Table) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """By side: the speaker's probability of every word, (targets, words); the listener's of every target,
        (words, targets)."""
        speak: dict[str, Rows] = {}
        listen: dict[str, Rows] = {}
        for side in self.sides:
            says = {t: self.says(side, t, table.language) for t in range(self.targets)}
            names = {w: self.names(side, w, table.language) for w in range(self.words)}
            told, heard = await asyncio.gather(distributions(table, says), distributions(table, names))
            rows = [[0.0] * self.words for _ in range(self.targets)]
            for target, probabilities in told.items():
                for choice, probability in enumerate(probabilities):
                    rows[target][self.said(target, choice)] = probability
            speak[side], listen[side] = rows, [heard[word] for word in range(self.words)]
        return speak, listen

    def exact_game(self, success: Mapping[str, Sequence[float]], speak: Mapping[str, Rows]) -> dict[str, float]:
        """The figures of `game` in expectation, and ``<side>_bits``, the mutual information of target and word.

        Args:
            success: for each side, the probability that a round counts, by target.
        """
        found = {f"{side}_success": math.fsum(success[side]) / self.targets for side in self.sides}
        found["success"] = math.fsum(found.values()) / len(self.sides)
        if len(self.sides) > 1:
            red, blue = success["red"], success["blue"]
            # the target is the same for both, so what both make of it is independent only target by target
            lead = math.fsum(p * (1 - q) for p, q in zip(red, blue, strict=True)) / self.targets
            lag = math.fsum(q * (1 - p) for p, q in zip(red, blue, strict=True)) / self.targets
            found.update(figures(odds(Odds(lead, 1.0 - lead - lag, lag), self.relay.rounds)))
        return {**found, **{f"{side}_bits": mutual_information_bits(speak[side]) for side in self.sides}}
