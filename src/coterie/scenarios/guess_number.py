"""Find a number by being told "higher" and "lower".

    a hidden number of 1..n; a guess is right, or moves one end of the interval in which the number must lie
    score of a player that is right at its g-th of at most G guesses: 1 - (g - 1) / G;  0 if it never is

Halving the interval needs at most floor(log2 n) + 1 guesses and no strategy needs fewer on average over all numbers:
binary search is the oracle. A player is shown the interval and nothing else, so the game is a Markov chain over
intervals, and `exact` has the solve rate and the expected number of guesses by dynamic programming over them.

All n numbers may be said at any time, also those the interval excludes, which waste a guess: to keep inside the
interval is part of what is to be learned; and one choice set for all prompts is what calibration needs
(`coterie.rollout.calibration`), where a set for each interval would be seen in one prompt only.

Players search on their own for the same number, or, `together`, take turns at one search. Every number is a task,
trained on and held out alike (`single_task`): a number never guessed in training would never be guessed again.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, ask, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random
from coterie.scenarios.welfare import alike
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TaskType, TrainingTask

Interval = tuple[int, int]
"""The least and the greatest number it can be."""

_PROMPTS: Final = {
    "en": {
        "system": "Guess a number, 1 to {numbers}.",
        "user": "Which?",
        "prefix": "Between {below} and {above}",
    },
    "zh": {"system": "猜1到{numbers}中的一个数。", "user": "哪个？", "prefix": "大于{below}小于{above}："},
}


class GuessNumberOptions(ScenarioOptions):
    """Settings of the guessing game."""

    numbers: int = Field(default=20, ge=2, le=100)
    """The hidden number is one of 1 .. numbers."""
    guesses: int = Field(default=6, ge=1, le=30)
    """Most guesses of one search."""
    players: int = Field(default=2, ge=1, le=8)
    """Seats: "guesser_1", "guesser_2", …; one is "guesser"."""
    together: bool = False
    """Whether players take turns at one search, and all have its score; else each searches on its own."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""


class Search(NamedTuple):
    """Figures of a search, expected or measured."""

    solved: float
    """Probability of finding the number."""
    guesses: float
    """Made; a search that fails makes all it has."""
    score: float
    outside: float
    """Guesses that were outside the interval."""


class GuessNumber:
    """Players look for a number.

    Metrics, of `play` and in expectation of `exact` alike, means over searches: ``solved``, ``guesses``, ``score``,
    ``outside`` (guesses the interval excludes). `exact` adds ``oracle_guesses`` and ``oracle_score``, those of binary
    search.

    Scripts: ``binary_search``, ``random``.
    """

    Options = GuessNumberOptions
    single_task = True

    def __init__(self, options: GuessNumberOptions) -> None:
        self.options = options
        count = options.players
        self.players = ["guesser"] if count == 1 else [f"guesser_{i}" for i in range(1, count + 1)]
        self.searches: list[list[SeatId]] = [self.players] if options.together else [[seat] for seat in self.players]
        """The players of each search, in the order of their turns."""
        self.scripts: Mapping[str, Script] = {
            "binary_search": _halve,
            "random": at_random,
        }

    # -- playing --------------------------------------------------------------------------------------------------

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every number once, in an order drawn from `seed`; for TRAIN again and again, each time reordered."""
        o = self.options
        rng = random.Random(f"guess_number:{split}:{seed}")
        while True:
            for number in rng.sample(range(1, o.numbers + 1), o.numbers):
                yield TrainingTask(
                    task_id=f"guess-number-{number}",
                    task_type=TaskType.REASONING,
                    difficulty=min(1.0, math.log2(o.numbers) / 7),
                    reward_pool=o.reward_pool,
                    max_steps=o.guesses,
                    required_models=o.players,
                    cooperation_level=o.cooperation_level,
                    content={"number": number},
                    split=split,
                )
            if split is Split.HELDOUT:
                return

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return alike(self.players)

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for a number out of range; a task may have no content."""
        self._number(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        number = self._number(task)
        found = await asyncio.gather(*(self._search(number, seats, table) for seats in self.searches))
        of_seat = {seat: search for seats, search in zip(self.searches, found, strict=True) for seat in seats}
        return Outcome(
            scores={seat: of_seat[seat].score for seat in self.players},
            accuracy={seat: of_seat[seat].solved for seat in self.players},
            metrics=_mean(found),
        )

    async def _search(self, number: int, seats: Sequence[SeatId], table: Table) -> Search:
        interval, outside = (1, self.options.numbers), 0
        for made in range(self.options.guesses):
            asked = self.question(seats[made % len(seats)], interval, table.language)
            guess = await ask(table, asked, "guess") + 1
            if guess == number:
                return Search(1.0, made + 1, self.score(made + 1), outside)
            outside += not interval[0] <= guess <= interval[1]
            interval = narrowed(interval, guess, number)
        return Search(0.0, self.options.guesses, 0.0, outside)

    def score(self, guesses: int) -> float:
        """Of a search that ends with the right guess."""
        return 1.0 - (guesses - 1) / self.options.guesses

    def question(self, seat: SeatId, interval: Interval, language: str) -> Question:
        """What a player sees of an interval."""
        text = _PROMPTS[language]
        shown = Observation(
            system=text["system"].format(numbers=self.options.numbers),
            user=text["user"],
            prefix=text["prefix"].format(below=interval[0] - 1, above=interval[1] + 1),
        )
        return Question(seat, shown, tuple(str(number) for number in range(1, self.options.numbers + 1)))

    def _number(self, task: TrainingTask) -> int:
        numbers = self.options.numbers
        if not task.content:
            return 1 + int.from_bytes(hashlib.sha256(task.task_id.encode()).digest()[:8]) % numbers
        number = task.content.get("number")
        if type(number) is not int or not 1 <= number <= numbers:
            raise ScenarioError(
                f"task {task.task_id!r}: content['number'] is {number!r}; it must be a whole number 1..{numbers}"
            )
        return number

    # -- exactly --------------------------------------------------------------------------------------------------

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table` over all numbers, and those of binary search; no sampling."""
        numbers = self.options.numbers
        intervals = [(low, high) for low in range(1, numbers + 1) for high in range(low, numbers + 1)]
        asked = {(seat, i): self.question(seat, i, table.language) for seat in self.players for i in intervals}
        answers = await distributions(table, asked)
        found = []
        for seats in self.searches:
            policies = [{interval: answers[seat, interval] for interval in intervals} for seat in seats]
            found.append(self.expected(policies))
        halving = {i: [float(number == _middle(i)) for number in range(1, numbers + 1)] for i in intervals}
        oracle = self.expected([halving])
        return {**_mean(found), "oracle_guesses": oracle.guesses, "oracle_score": oracle.score}

    def expected(self, policies: Sequence[Mapping[Interval, Sequence[float]]]) -> Search:
        """Expected figures of a search by players with these policies, in turns, for a number drawn evenly.

        Forward over the guesses: for every interval, the probability that the search is there, whatever the number;
        given that, each number of the interval is as likely as any other of it.
        """
        o = self.options
        reached = {(1, o.numbers): 1.0}
        solved = guesses = score = outside = 0.0
        for made in range(o.guesses):
            guesses += math.fsum(reached.values())
            following: dict[Interval, float] = {}
            for interval, probability in reached.items():
                low, high = interval
                size = high - low + 1
                for guess, chance in enumerate(policies[made % len(policies)][interval], start=1):
                    weight = probability * chance
                    if not weight:
                        continue
                    if not low <= guess <= high:
                        outside += weight
                        following[interval] = following.get(interval, 0.0) + weight
                        continue
                    solved += weight / size
                    score += weight / size * self.score(made + 1)
                    for part in ((low, guess - 1), (guess + 1, high)):
                        if part[0] <= part[1]:
                            share = weight * (part[1] - part[0] + 1) / size
                            following[part] = following.get(part, 0.0) + share
            reached = following
        return Search(solved, guesses, score, outside)


def narrowed(interval: Interval, guess: int, number: int) -> Interval:
    """The interval after a wrong guess."""
    low, high = interval
    return (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))


def _middle(interval: Interval) -> int:
    return sum(interval) // 2


def _halve(seen: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """The middle of the interval shown."""
    below, above = (int(number) for number in re.findall(r"\d+", seen.prefix))
    return choices[_middle((below + 1, above - 1)) - 1]


def _mean(searches: Sequence[Search]) -> dict[str, float]:
    return {
        name: math.fsum(values) / len(searches)
        for name, values in zip(Search._fields, zip(*searches, strict=True), strict=True)
    }
