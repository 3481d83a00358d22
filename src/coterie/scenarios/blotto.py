"""Colonel Blotto: two commanders send their troops to fields at the same time; more troops take a field.

    allocation: `troops` spread over `fields`, written as the field of every troop in rising order ("1 1 3" is "113")
    margin = fields taken - fields lost;  score = 1 for a positive margin, 1/2 for none, 0 for a negative one,
    or, with score = "fields", the share of the fields taken, half for a field with equal numbers

Borel (1921, "La théorie du jeu et les équations intégrales à noyau symétrique"); Roberson (2006, "The Colonel Blotto
game"). The game is symmetric, its value is 1/2, and from three fields on it has no pure equilibrium unless troops are
few. All allocations are one choice set, decoded digit by digit along the token trie, so there is one prompt, and
`exact` has NashConv over all allocations. There is one task without further content (`single_task`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Final, Literal

from pydantic import Field, model_validator

from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.contests import sign
from coterie.scenarios.welfare import alike
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

Allocation = tuple[int, ...]
"""Troops on each field."""

MAX_ALLOCATIONS: Final = 500
SEATS: Final = ("first", "second")

_PROMPTS: Final = {
    "en": {
        "system": "Send {troops} units to fields 1 to {fields}.",
        "user": "More units take a field.",
        "prefix": "Fields:",
    },
    "zh": {"system": "把{troops}个兵派到1到{fields}号地。", "user": "兵多者得地。", "prefix": "地："},
}


def allocations(troops: int, fields: int) -> list[Allocation]:
    """Every way to spread `troops` over `fields`, in the order of their names."""
    placed = combinations_with_replacement(range(fields), troops)
    return [tuple(where.count(field) for field in range(fields)) for where in placed]


def name(allocation: Allocation) -> str:
    """The field of every troop, in rising order: (2, 0, 1) is "113"."""
    return "".join(str(field) * count for field, count in enumerate(allocation, start=1))


def margin(one: Allocation, other: Allocation) -> int:
    """Fields `one` takes minus fields it loses."""
    return sum(sign(a - b) for a, b in zip(one, other, strict=True))


def check_size(troops: int, fields: int) -> None:
    """Raises `ValueError` for more than `MAX_ALLOCATIONS` allocations."""
    count = math.comb(troops + fields - 1, troops)
    if count > MAX_ALLOCATIONS:
        raise ValueError(
            f"{troops} troops on {fields} fields are {count} allocations; at most {MAX_ALLOCATIONS} are chosen among"
        )


class BlottoOptions(ScenarioOptions):
    """Settings of Colonel Blotto."""

    fields: int = Field(default=3, ge=2, le=9)
    """To be taken."""
    troops: int = Field(default=4, ge=1, le=12)
    """Of each commander."""
    score: Literal["battle", "fields"] = "battle"
    """battle: whoever takes more fields wins. fields: the share of the fields taken."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.0, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @model_validator(mode="after")
    def _small(self) -> BlottoOptions:
        check_size(self.troops, self.fields)
        return self


class Blotto:
    """Seats "first" and "second" allocate at the same time.

    Metrics of `play`: ``margin``, the fields first took minus those it lost; ``spread``, the mean number of fields a
    commander sent troops to.

    Scripts: ``random``, every allocation alike; ``even``, as even as can be, the fields with one more troop drawn.
    """

    Options = BlottoOptions
    single_task = True

    def __init__(self, options: BlottoOptions) -> None:
        self.options = options
        self.allocations = allocations(options.troops, options.fields)
        least, most = divmod(options.troops, options.fields)
        even = [name(a) for a in self.allocations if min(a) == least and max(a) == least + (most > 0)]
        self.scripts: Mapping[str, Script] = {
            "random": at_random,
            "even": lambda seen, choices, rng: rng.choice(even),
        }

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """The one task: endlessly for TRAIN, once for HELDOUT."""
        o = self.options
        task = TrainingTask(
            task_id=f"blotto-{o.troops}-{o.fields}",
            task_type=TaskType.OPTIMIZATION,
            reward_pool=o.reward_pool,
            max_steps=1,
            required_models=2,
            cooperation_level=o.cooperation_level,
            content={"troops": o.troops, "fields": o.fields},
            split=split,
        )
        return repeated(task)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return alike(SEATS)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        asked = [self.question(seat, table.language) for seat in SEATS]
        first, second = [self.allocations[choice] for choice in await choose(table, asked, "move")]
        score = self.score(first, second)
        return Outcome(
            scores={"first": score, "second": 1.0 - score},
            metrics={"margin": float(margin(first, second)), "spread": (_used(first) + _used(second)) / 2},
        )

    async def exact(self, table: Table) -> dict[str, float]:
        """Of the policies at `table`, over all pairs of allocations.

        Returns:
            ``first_score``: expected; ``nash_conv``: what both would gain by best responses, together, in scores
            (Lanctot et al., 2017), 0 in equilibrium and at most 1; ``<seat>_exploitability``: what the best response
            to that seat scores above the game's value of 1/2; ``spread`` as in `play`.
        """
        answers = await distributions(table, {seat: self.question(seat, table.language) for seat in SEATS})
        first, second = (answers[seat] for seat in SEATS)
        # the game is symmetric: both answer by the same scores
        against_first, against_second = self.best_response(first), self.best_response(second)
        value = math.fsum(
            p * q * self.score(a, b)
            for p, a in zip(first, self.allocations, strict=True)
            for q, b in zip(second, self.allocations, strict=True)
        )
        return {
            "first_score": value,
            "nash_conv": max(0.0, against_second - value) + max(0.0, against_first - (1.0 - value)),
            "first_exploitability": against_first - 0.5,
            "second_exploitability": against_second - 0.5,
            "spread": math.fsum(
                p * _used(a) / 2 for policy in (first, second) for p, a in zip(policy, self.allocations, strict=True)
            ),
        }

    def best_response(self, policy: Sequence[float]) -> float:
        """The greatest expected score against a commander that draws its allocation with these probabilities."""
        return max(
            math.fsum(p * self.score(own, other) for p, other in zip(policy, self.allocations, strict=True))
            for own in self.allocations
        )

    def score(self, own: Allocation, other: Allocation) -> float:
        """Of the one who allocates `own`, in [0, 1]; the other has the rest."""
        taken = margin(own, other)
        if self.options.score == "fields":
            return 0.5 + taken / (2 * self.options.fields)
        return (1 + sign(taken)) / 2

    def question(self, seat: str, language: str) -> Question:
        """The same for both seats."""
        text = _PROMPTS[language]
        system = text["system"].format(troops=self.options.troops, fields=self.options.fields)
        shown = Observation(system=system, user=text["user"], prefix=text["prefix"])
        return Question(seat, shown, tuple(map(name, self.allocations)))


def _used(allocation: Allocation) -> int:
    return sum(count > 0 for count in allocation)
