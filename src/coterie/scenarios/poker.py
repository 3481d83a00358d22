"""Kuhn and Leduc poker, played by language models and measured exactly.

    deal --> the seats move in turn, seeing their own card and all moves --> antes won or lost
    score = (antes won + the most one can lose) / (2 * the most one can lose)              zero-sum: scores sum to 1

A deal is a task: siblings of a group have the same cards, so credit compares what was done and not what was dealt.
There are only 6 deals (30 in Leduc), and training takes all of them in turn; held-out play has each once, the same ones
(`single_task`). What is learned is therefore judged by `exact`, which asks the policies at every information state and
computes how far they are from equilibrium, without sampling.

Modes that pay by rank (competitive, team_battle, mixed) see who won, not how much; to train for the antes themselves,
use a credit scheme on scores (team_structured with individual = 1 and reward_weight = 0).

What a seat has seen stands in the beginning of its own answer, so that situations with a common past share it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Final, cast

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, ask, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random
from coterie.scenarios.poker_rules import (
    CALL,
    FIRST,
    FOLD,
    KUHN,
    LEDUC,
    RAISE,
    SECOND,
    Deal,
    Hand,
    PokerRules,
    View,
    facing,
)
from coterie.scenarios.sequential import (
    CHANCE,
    TERMINAL,
    GameTree,
    Policy,
    best_response,
    expected_returns,
    game_tree,
)
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TaskType, TrainingTask

SEATS: Final[tuple[SeatId, SeatId]] = ("first", "second")


@dataclass(frozen=True, slots=True)
class Wording:
    """How a game is told in one language."""

    system: str
    user: str
    card: str
    """Ends what a seat is shown, just before its move; {} is its card."""
    public: str
    """Tells the public card, {}."""
    move: str
    """Tells a move: {who} did {what}."""
    own: str
    other: str
    """Who, from the point of view of the seat."""
    ranks: tuple[str, ...]
    moves: Mapping[tuple[bool, str], str]
    """(whether a bet was faced, move) -> its word."""


class PokerOptions(ScenarioOptions):
    """Settings of a poker game."""

    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.0, ge=0, le=1)
    """Of each task; matters in mode mixed."""


class Poker:
    """What Kuhn's and Leduc's game have in common: seats "first" and "second" are dealt cards and bet.

    Metrics of `play`: ``first_antes``, what the first seat won; ``showdown``, whether nobody folded.
    """

    Options: ClassVar[type[ScenarioOptions]] = PokerOptions
    single_task = True
    name: ClassVar[str]
    rules: ClassVar[PokerRules]
    wordings: ClassVar[Mapping[str, Wording]]

    def __init__(self, options: PokerOptions) -> None:
        self.options = options
        self.scripts: Mapping[str, Script] = {"random": at_random, "caller": self._caller}
        self.question = cache(self._question)
        """What a player is asked when it is to move at a view, in a language; thousands of episodes ask the same."""

    @cached_property
    def tree(self) -> GameTree:
        """All of the game."""
        return game_tree(self.rules)

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every deal once; for TRAIN over and over, each time in another order."""
        rng = random.Random(f"{seed}:{self.name}")
        while True:
            order = list(range(len(self.rules.deals)))
            if split is Split.TRAIN:
                rng.shuffle(order)
            yield from (self._task(number, split) for number in order)
            if split is Split.HELDOUT:
                return

    def _task(self, number: int, split: Split) -> TrainingTask:
        return TrainingTask(
            task_id=f"{self.name}-{number}",
            task_type=TaskType.REASONING,
            reward_pool=self.options.reward_pool,
            max_steps=len(self.rules.bets) * self.rules.most_moves,
            required_models=len(SEATS),
            cooperation_level=self.options.cooperation_level,
            content={"deal": list(self.rules.deals[number])},
            split=split,
        )

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(seat) for seat in SEATS]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for a deal the deck does not allow. Without content, the table's generator deals."""
        if task.content:
            self._deal(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        deal = self._deal(task) if task.content else table.rng.choice(self.rules.deals)
        hand = self.rules.initial()
        while (mover := self.rules.mover(hand)) != TERMINAL:
            if mover == CHANCE:
                hand = self.rules.dealt(hand, deal)
                continue
            asked = self.question(mover, self.rules.information(hand), table.language)
            hand = self.rules.after(hand, self.rules.actions(hand)[await ask(table, asked, "move")])
        antes = self.rules.returns(hand)
        return Outcome(
            scores={seat: self.score(won) for seat, won in zip(SEATS, antes, strict=True)},
            metrics={"first_antes": antes[FIRST], "showdown": float(not hand.rounds[-1].endswith(FOLD))},
        )

    async def exact(self, table: Table) -> dict[str, float]:
        """How good the policies at `table` are, asked at every information state; no sampling.

        Returns:
            All in antes a game: ``first_value``, what the first seat wins on average; ``nash_conv``, the sum of what
            each seat would gain by a best response to the other (Lanctot et al., 2017), 0 in equilibrium;
            ``exploitability_first`` and ``exploitability_second``, what each seat loses to a best response beyond
            the value of the game; they sum to ``nash_conv``.
        """
        policies = await self._policies(table)
        worst_of_second = best_response(self.tree, policies, FIRST)[0]
        worst_of_first = best_response(self.tree, policies, SECOND)[0]
        return {
            "nash_conv": max(0.0, worst_of_first + worst_of_second),  # the returns sum to 0
            "first_value": expected_returns(self.tree, policies)[FIRST],
            "exploitability_first": worst_of_first + self.rules.value,
            "exploitability_second": worst_of_second - self.rules.value,
            **self._figures(policies),
        }

    def _figures(self, policies: Sequence[Policy]) -> dict[str, float]:
        """What else is told of the policies of both seats."""
        return {}

    async def _policies(self, table: Table) -> list[Policy]:
        """What the seats do at each information state of theirs."""
        asked = {(player, view): self.question(player, view, table.language) for player, view in self._views}
        policies: list[dict[Any, Sequence[float]]] = [{}, {}]
        for (player, view), probabilities in (await distributions(table, asked)).items():
            policies[player][view] = probabilities
        return list(policies)

    def _question(self, player: int, view: View, language: str) -> Question:
        return Question(SEATS[player], self.shown(player, view, language), self.choices(view, language))

    def shown(self, player: int, view: View, language: str) -> Observation:
        """What a player sees when it is to move at `view`; the two seats differ only in who did what."""
        told = self.wordings[language]
        parts: list[str] = []
        for number, moves in enumerate(view.rounds):
            if number > 0:
                assert view.public is not None
                parts.append(told.public.format(told.ranks[view.public]))
            for turn, move in enumerate(moves):
                who = told.own if turn % 2 == player else told.other
                parts.append(told.move.format(who=who, what=told.moves[facing(moves[:turn]), move]))
        parts.append(told.card.format(told.ranks[view.card]))
        return Observation(system=told.system, user=told.user, prefix="".join(parts))

    def choices(self, view: View, language: str) -> tuple[str, ...]:
        """The words for the legal moves at `view`, in the order of the rules."""
        words = self.wordings[language].moves
        moves = view.rounds[-1]
        return tuple(words[facing(moves), move] for move in self.rules.actions(Hand((), None, (moves,))))

    def score(self, antes: float) -> float:
        """Antes won, moved to [0, 1]; 0.5 is neither won nor lost."""
        return (antes + self.rules.stake) / (2 * self.rules.stake)

    def seen(self, observation: Observation) -> tuple[int, View]:
        """The player and the information state an observation was made of. Raises `ScenarioError` for any other."""
        try:
            return self._told[observation]
        except KeyError:
            raise ScenarioError(f"{self.name} never shows {observation.prefix!r}") from None

    @cached_property
    def _told(self) -> dict[Observation, tuple[int, View]]:
        return {self.shown(*view, language): view for language in self.wordings for view in self._views}

    @cached_property
    def _views(self) -> list[tuple[int, View]]:
        """Every player and information state of its."""
        return [(found.player, cast(View, found.information)) for found in self.tree.information_states]

    def _caller(self, observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
        """Never folds and never raises."""
        _, view = self.seen(observation)
        return choices[int(facing(view.rounds[-1]))]  # after fold, where there is a bet to fold to

    def _deal(self, task: TrainingTask) -> Deal:
        told = task.content.get("deal")
        for deal in self.rules.deals:
            if told == list(deal) or told == deal:
                return deal
        raise ScenarioError(
            f"task {task.task_id!r}: content['deal'] is {told!r}; it must be a list like {list(self.rules.deals[0])}: "
            f"a card for each seat{' and a public one' if len(self.rules.bets) > 1 else ''}, "
            f"out of {list(self.rules.deck)}"
        )


_KUHN_EN: Final = Wording(
    system="Cards: Jack, Queen, King. The higher card wins.",
    user="Pass or bet?",
    card="With my {}",
    public="",
    move="{who} {what}. ",
    own="I",
    other="You",
    ranks=("Jack", "Queen", "King"),
    moves={(False, CALL): "pass", (False, RAISE): "bet", (True, FOLD): "pass", (True, CALL): "bet"},
)
_KUHN_ZH: Final = Wording(
    system="牌有小、中、大，大者胜。",
    user="过还是押？",
    card="我用{}",
    public="",
    move="{who}{what}。",
    own="我",
    other="你",
    ranks=("小", "中", "大"),
    moves={(False, CALL): "过", (False, RAISE): "押", (True, FOLD): "过", (True, CALL): "押"},
)


class Kuhn(Poker):
    """Three cards, one bet: Kuhn poker. The words are pass and bet throughout: to pass on a bet is to fold, to bet on a
    bet is to call.

    `exact` also gives how often the moves are made that tell equilibria from other play: ``first_bluff`` (bets the
    lowest card), ``first_value_bet`` (bets the highest), ``first_call`` (calls with the middle one after passing),
    ``second_bluff`` (bets the lowest after a pass), ``second_call`` (calls with the middle one). In equilibrium they
    are a, 3a, a + 1/3, 1/3 and 1/3, for any a from 0 to 1/3.

    Scripts: ``random``; ``caller``, which never bets and never passes on a bet; ``equilibrium``.
    """

    name = "kuhn"
    rules = KUHN
    wordings: ClassVar[Mapping[str, Wording]] = {"en": _KUHN_EN, "zh": _KUHN_ZH}

    def __init__(self, options: PokerOptions) -> None:
        super().__init__(options)
        self.scripts = {**self.scripts, "equilibrium": self._equilibrium}

    def _figures(self, policies: Sequence[Policy]) -> dict[str, float]:
        first, second = policies
        return {
            "first_bluff": first[View(0, None, ("",))][1],
            "first_value_bet": first[View(2, None, ("",))][1],
            "first_call": first[View(1, None, (CALL + RAISE,))][1],
            "second_bluff": second[View(0, None, (CALL,))][1],
            "second_call": second[View(1, None, (RAISE,))][1],
        }

    def _equilibrium(self, observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
        """The equilibrium that bluffs most."""
        player, view = self.seen(observation)
        return rng.choices(choices, kuhn_equilibrium(1 / 3)[player][view])[0]


def kuhn_equilibrium(bluff: float) -> tuple[dict[View, tuple[float, float]], dict[View, tuple[float, float]]]:
    """The equilibrium of Kuhn poker in which the first seat bets its lowest card with probability `bluff`.

    Returns:
        For each seat and information state, the probabilities of pass and bet.

    Raises:
        ValueError: `bluff` is outside 0..1/3, where there is none.
    """
    if not 0.0 <= bluff <= 1 / 3:
        raise ValueError(f"bluff is {bluff}; equilibria have 0..1/3")
    bets: tuple[dict[tuple[int, str], float], ...] = (
        {(0, ""): bluff, (1, ""): 0.0, (2, ""): 3 * bluff, (0, "cr"): 0.0, (1, "cr"): bluff + 1 / 3, (2, "cr"): 1.0},
        {(0, "c"): 1 / 3, (1, "c"): 0.0, (2, "c"): 1.0, (0, "r"): 0.0, (1, "r"): 1 / 3, (2, "r"): 1.0},
    )
    first, second = ({View(card, None, (moves,)): (1 - p, p) for (card, moves), p in of.items()} for of in bets)
    return first, second


_LEDUC_EN: Final = Wording(
    system="Cards: two Jacks, two Queens, two Kings. A pair with the table card wins, else the higher card.",
    user="Fold, check, call or raise?",
    card="With my {}",
    public="The table card is {}. ",
    move="{who} {what}. ",
    own="I",
    other="You",
    ranks=("Jack", "Queen", "King"),
    moves={
        (False, CALL): "check", (False, RAISE): "raise", (True, FOLD): "fold", (True, CALL): "call",
        (True, RAISE): "raise",
    },
)  # fmt: skip
_LEDUC_ZH: Final = Wording(
    system="小、中、大各两张。与公共牌成对者胜，否则大者胜。",
    user="弃、过、跟还是加？",
    card="我用{}",
    public="公共牌是{}。",
    move="{who}{what}。",
    own="我",
    other="你",
    ranks=("小", "中", "大"),
    moves={
        (False, CALL): "过", (False, RAISE): "加", (True, FOLD): "弃", (True, CALL): "跟", (True, RAISE): "加",
    },
)  # fmt: skip


class Leduc(Poker):
    """Six cards in pairs, two rounds, a public card: Leduc hold'em. Bets are 2 antes, then 4; at most two a round.

    Scripts: ``random``; ``caller``, which checks and calls.
    """

    name = "leduc"
    rules = LEDUC
    wordings: ClassVar[Mapping[str, Wording]] = {"en": _LEDUC_EN, "zh": _LEDUC_ZH}
