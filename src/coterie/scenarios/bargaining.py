"""Two divide a few items that are worth different things to them, by offers in turn (Rubinstein, 1982).

    first offers a division -> second takes it, or offers another -> first takes that, or ... ; the last offer of
    `offers` is taken or refused
    payoff = worth of the items one gets, by the worth of all of them, times discount^(offers made - 1); 0 for both
    without agreement;  score = payoff

Values are private: a permutation of `values` for each seat, drawn by the task. Where both value items differently,
there are divisions better for both than halves, and an agreement says how much of that was found: the Nash product
of the payoffs (Nash, 1950, "The bargaining problem") is greatest at the fair and efficient one. Similar divisions of
objects: DeVault et al. (2015), Lewis et al. (2017, arXiv 1706.05125).

An offer is one choice: the items its author keeps. Its reader sees the items it would get and its own values, so
prompts are few, and `exact` follows every offer for every pair of values. A pair of values is a task; every fourth
pair is held out, so that training never sees it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from typing import Final

from pydantic import Field, field_validator

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, ask, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random
from coterie.scenarios.welfare import equality
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

Values = tuple[int, ...]
"""What each item is worth to a seat."""
Pair = tuple[Values, Values]
"""Of first and of second."""
Items = tuple[bool, ...]
"""Which items one has."""

SEATS: Final = ("first", "second")

_NAMES: Final = {"en": "ABCD", "zh": "甲乙丙丁"}
_PROMPTS: Final = {
    "en": {
        "system": "Divide {items}.",
        "worth": "Worth to you: {values}.",
        "separator": ", ",
        "none": "none",
        "start": "Offer: nothing yet.",
        "offer": "Offer: you get {items}.",
        "keep": "Keep:",
        "answer": "Answer:",
        "yes": "yes",
        "no": "no",
    },
    "zh": {
        "system": "分{items}。",
        "worth": "对你值：{values}。",
        "separator": "，",
        "none": "无",
        "start": "提议：还没有。",
        "offer": "提议：你得{items}。",
        "keep": "留：",
        "answer": "回答：",
        "yes": "同意",
        "no": "不",
    },
}


class BargainingOptions(ScenarioOptions):
    """Settings of bargaining."""

    values: tuple[int, ...] = (5, 3, 1)
    """What the items are worth, to each seat in an order of its own: two to four different whole numbers."""
    offers: int = Field(default=2, ge=1, le=10)
    """Most offers; the last can only be taken or refused, so 1 is the ultimatum game."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """What a payoff is multiplied by for every offer after the first."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @field_validator("values")
    @classmethod
    def _few(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not 2 <= len(value) <= len(_NAMES["en"]):
            raise ValueError(f"needs two to {len(_NAMES['en'])} items, got {len(value)}")
        if len(set(value)) < len(value) or min(value) < 1:
            raise ValueError("needs different whole numbers of at least 1")
        return value


class Bargaining:
    """Seats "first" and "second" make offers in turn.

    Metrics, of `play` and in expectation of `exact` alike, 0 where there is no agreement: ``agreement``;
    ``nash_product``, the product of both payoffs; ``nash_efficiency``, that by the greatest possible for these values;
    ``pareto``, whether no other division is better for one and not worse for the other; ``welfare``, the sum of both
    payoffs by the greatest possible; ``equality``, 1 - Gini of the payoffs; ``offers``, how many were made.

    Scripts: ``fair``, which offers and takes what is worth half or more to itself; ``random``.
    """

    Options = BargainingOptions

    def __init__(self, options: BargainingOptions) -> None:
        self.options = options
        count = len(options.values)
        self.values: list[Values] = list(permutations(options.values))
        self.divisions: list[Items] = list(product((False, True), repeat=count))
        """What the author of an offer may keep."""
        self.scripts: Mapping[str, Script] = {
            "fair": lambda seen, choices, rng: self._fair(seen, choices),
            "random": at_random,
        }

    # -- the rules ------------------------------------------------------------------------------------------------

    def worth(self, values: Values, items: Items) -> float:
        """Worth of the items by the worth of all."""
        return sum(v for v, has in zip(values, items, strict=True) if has) / sum(values)

    def payoffs(self, pair: Pair, author: int, kept: Items, offers: int) -> tuple[float, float]:
        """Of both seats when the offer of seat `author` (0 or 1), the last of `offers`, is taken."""
        scale = self.options.discount ** (offers - 1)
        mine, theirs = self.worth(pair[author], kept), self.worth(pair[1 - author], _rest(kept))
        return (scale * mine, scale * theirs) if author == 0 else (scale * theirs, scale * mine)

    def figures(self, pair: Pair, payoffs: tuple[float, float] | None, offers: int) -> dict[str, float]:
        """The metrics of one play; `payoffs` None: no agreement."""
        names = ("agreement", "nash_product", "nash_efficiency", "pareto", "welfare", "equality")
        if payoffs is None:
            return {**dict.fromkeys(names, 0.0), "offers": float(offers)}
        possible = [self.payoffs(pair, 0, kept, 1) for kept in self.divisions]
        # the discount makes all divisions alike smaller, so the one agreed on is compared with those of its own time
        scale = self.options.discount ** (offers - 1)
        now = [(scale * a, scale * b) for a, b in possible]
        better = any(
            a >= payoffs[0] - 1e-12 and b >= payoffs[1] - 1e-12 and a + b > sum(payoffs) + 1e-9 for a, b in now
        )
        found = (
            1.0,
            math.prod(payoffs),
            math.prod(payoffs) / max(a * b for a, b in possible),
            float(not better),
            sum(payoffs) / max(a + b for a, b in possible),
            equality(payoffs),
        )
        return {**dict(zip(names, found, strict=True)), "offers": float(offers)}

    # -- playing --------------------------------------------------------------------------------------------------

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every pair of values of this side once, in an order drawn from `seed`; for TRAIN again and again."""
        rng = random.Random(f"bargaining:{split}:{seed}")
        pairs = self.pairs(split)
        while True:
            for first, second in rng.sample(pairs, len(pairs)):
                yield TrainingTask(
                    task_id="-".join(["bargaining", *("".join(map(str, values)) for values in (first, second))]),
                    task_type=TaskType.COLLABORATION,
                    reward_pool=self.options.reward_pool,
                    max_steps=1 + self.options.offers // 2,
                    required_models=2,
                    cooperation_level=self.options.cooperation_level,
                    content={"first": list(first), "second": list(second)},
                    split=split,
                )
            if split is Split.HELDOUT:
                return

    def pairs(self, split: Split | None = None) -> list[Pair]:
        """Pairs of values of one side of the border; None: of both."""
        return [
            (first, second)
            for (i, first), (j, second) in product(enumerate(self.values), repeat=2)
            if split is None or ((i + 2 * j) % 4 == 3) is (split is Split.HELDOUT)
        ]

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(seat) for seat in SEATS]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for values that are no permutations of the option `values`."""
        self._pair(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        pair = self._pair(task)
        offer: Items | None = None
        payoffs = None
        made = 0
        for made in range(self.options.offers + 1):
            seat = made % 2
            asked = self.question(seat, pair[seat], offer, made == self.options.offers, table.language)
            answer = self.answer(await ask(table, asked, "offer"), made)
            if answer is True and offer is not None:
                payoffs = self.payoffs(pair, 1 - seat, _rest(offer), made)
            if isinstance(answer, bool):
                break
            offer = _rest(answer)
        scores = dict(zip(SEATS, payoffs or (0.0, 0.0), strict=True))
        return Outcome(scores=scores, metrics=self.figures(pair, payoffs, made))

    def answer(self, choice: int, made: int) -> bool | Items:
        """What a choice means after `made` offers: taken, refused, or what the author of a new offer keeps."""
        if made == self.options.offers:
            return choice == 0
        if made == 0:
            return self.divisions[choice]
        return True if choice == 0 else self.divisions[choice - 1]

    def question(self, seat: int, values: Values, offer: Items | None, last: bool, language: str) -> Question:
        """What a seat sees. `offer`: the items it would get; None: it opens. `last`: it can only take or refuse."""
        text, names = _PROMPTS[language], _NAMES[language][: len(values)]
        worth = text["separator"].join(f"{n} {v}" for n, v in zip(names, values, strict=True))
        heard = text["start"] if offer is None else text["offer"].format(items=self._name(offer, language))
        shown = Observation(
            system=text["system"].format(items=text["separator"].join(names)),
            user=f"{text['worth'].format(values=worth)}\n{heard}",
            prefix=text["answer"] if last else text["keep"],
        )
        if last:
            return Question(SEATS[seat], shown, (text["yes"], text["no"]))
        divisions = tuple(self._name(items, language) for items in self.divisions)
        return Question(SEATS[seat], shown, divisions if offer is None else (text["yes"], *divisions))

    def _name(self, items: Items, language: str) -> str:
        held = "".join(n for n, has in zip(_NAMES[language], items, strict=False) if has)
        return held or _PROMPTS[language]["none"]

    def _pair(self, task: TrainingTask) -> Pair:
        if not task.content:
            return random.Random(f"bargaining:{task.task_id}").choice(self.pairs())
        found = []
        for seat in SEATS:
            values = task.content.get(seat)
            if not isinstance(values, list | tuple) or tuple(values) not in self.values:
                raise ScenarioError(
                    f"task {task.task_id!r}: content[{seat!r}] is {values!r}; it must be the numbers "
                    f"{list(self.options.values)} in any order"
                )
            found.append(tuple(values))
        return found[0], found[1]

    def _fair(self, seen: Observation, choices: Sequence[str]) -> str:
        """Takes what is worth half or more; else asks for the least that is."""
        language = "en" if seen.prefix in (_PROMPTS["en"]["keep"], _PROMPTS["en"]["answer"]) else "zh"
        text = _PROMPTS[language]
        first, heard = seen.user.splitlines()
        numbers = "".join(c if c.isdigit() else " " for c in first).split()
        values = tuple(int(number) for number in numbers)
        named = {text["offer"].format(items=self._name(items, language)): items for items in self.divisions}
        enough = heard in named and self.worth(values, named[heard]) >= 0.5
        if enough:
            return text["yes"]
        if text["no"] in choices:
            return text["no"]
        _, items = min(
            (self.worth(values, items), items) for items in self.divisions if self.worth(values, items) >= 0.5
        )
        return self._name(items, language)

    # -- exactly --------------------------------------------------------------------------------------------------

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table` over all pairs of values of both splits; nothing is sampled.

        Returns:
            The metrics of `play` in expectation, and ``first_payoff`` and ``second_payoff``.
        """
        kinds = [(None, False)] + [(items, last) for items in self.divisions for last in (False, True)]
        asked = {
            (seat, values, offer, last): self.question(seat, values, offer, last, table.language)
            for seat in (0, 1)
            for values in self.values
            for offer, last in kinds
            if self._asks(seat, offer, last)
        }
        answers = await distributions(table, asked)
        totals: dict[str, list[float]] = {}
        pairs = self.pairs()
        for pair in pairs:
            for name, value in self._expected(pair, answers).items():
                totals.setdefault(name, []).append(value)
        return {name: math.fsum(values) / len(pairs) for name, values in totals.items()}

    def _asks(self, seat: int, offer: Items | None, last: bool) -> bool:
        """Whether the game ever asks this of a seat."""
        if offer is None:
            return seat == 0
        if last:
            return seat == self.options.offers % 2
        return any(made % 2 == seat for made in range(1, self.options.offers))

    def _expected(
        self,
        pair: Pair,
        answers: Mapping[tuple[int, Values, Items | None, bool], Sequence[float]],
    ) -> dict[str, float]:
        """Expected metrics and payoffs for one pair of values."""
        totals: dict[str, list[float]] = {}
        reached: dict[Items | None, float] = {None: 1.0}
        for made in range(self.options.offers + 1):
            seat, last = made % 2, made == self.options.offers
            following: dict[Items | None, float] = {}
            for offer, probability in reached.items():
                for choice, chance in enumerate(answers[seat, pair[seat], offer, last]):
                    answer = self.answer(choice, made)
                    weight = probability * chance
                    if not isinstance(answer, bool):
                        then = _rest(answer)
                        following[then] = following.get(then, 0.0) + weight
                        continue
                    taken = offer is not None and answer
                    payoffs = self.payoffs(pair, 1 - seat, _rest(offer), made) if offer and taken else None
                    paid = dict(zip(("first_payoff", "second_payoff"), payoffs or (0.0, 0.0), strict=True))
                    for name, value in {**self.figures(pair, payoffs, made), **paid}.items():
                        totals.setdefault(name, []).append(weight * value)
            reached = following
        return {name: math.fsum(values) for name, values in totals.items()}


def _rest(items: Items) -> Items:
    """What the other one gets."""
    return tuple(not has for has in items)
