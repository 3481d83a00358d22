"""Small poker games for two: one private card each, fixed bets, at most one public card.

    ante 1 each --chance--> private cards --bets--> [--chance--> public card --bets-->] showdown, or somebody folded

In a round the first player moves first. Nobody has bet: call (nothing to pay: check) or raise (bet). Somebody has:
fold, call, or raise while the cap allows it. A round is over when a bet is called or both have checked. At the
showdown a pair with the public card wins, or else the higher card; equals share the pot.

Suits do not matter and are not modelled: chance deals ranks, with the probabilities of the whole deck. So the Leduc
game has 288 information states here and 936 where suits are told apart; equilibria and exploitability are the same.

Sources: Kuhn 1950 ("A simplified two-person poker"); Southey et al. 2005 ("Bayes' bluff: opponent modelling in poker").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Final, cast

from coterie.scenarios.sequential import CHANCE, TERMINAL, Action

FOLD: Final = "f"
CALL: Final = "c"
RAISE: Final = "r"

FIRST: Final = 0
SECOND: Final = 1

Deal = tuple[int, ...]
"""The first player's card, the second's, and, in a game of two rounds, the public one."""


@dataclass(frozen=True, slots=True)
class Hand:
    """A state: what has been dealt and done."""

    cards: tuple[int, ...] = ()
    """Private cards: none before the deal, then one of each player."""
    public: int | None = None
    rounds: tuple[str, ...] = ("",)
    """Moves of each round, one letter each."""


@dataclass(frozen=True, slots=True)
class View:
    """An information state: what the player to move has seen."""

    card: int
    public: int | None
    rounds: tuple[str, ...]


@dataclass(frozen=True)
class PokerRules:
    """A game of one or two rounds; returns are in antes."""

    deck: tuple[int, ...]
    """Cards; equal numbers are not told apart."""
    bets: tuple[int, ...]
    """Size of a bet or raise, in antes, in each round."""
    cap: int
    """Most bets and raises in a round."""
    value: float
    """What the first player gets, in antes, when both play an equilibrium."""
    players: int = 2

    def rank(self, card: int) -> int:
        """What counts of a card."""
        return card

    def initial(self) -> Hand:
        return Hand()

    def mover(self, state: Hand) -> int:
        """See `SequentialGame.mover`."""
        moves = state.rounds[-1]
        if not state.cards:
            return CHANCE
        if moves.endswith(FOLD):
            return TERMINAL
        if _closed(moves):
            return TERMINAL if len(state.rounds) == len(self.bets) else CHANCE
        return len(moves) % 2

    def chances(self, state: Hand) -> list[tuple[Action, float]]:
        """Pairs of private cards, or public cards, each with its probability."""
        if not state.cards:
            return _shares(list(permutations(self.deck, 2)))
        left = list(self.deck)
        for card in state.cards:
            left.remove(card)
        return _shares(left)

    def actions(self, state: Hand) -> tuple[str, ...]:
        """See `SequentialGame.actions`; in the order fold, call, raise."""
        moves = state.rounds[-1]
        fold = (FOLD,) if facing(moves) else ()
        more = (RAISE,) if moves.count(RAISE) < self.cap else ()
        return (*fold, CALL, *more)

    def after(self, state: Hand, action: Action) -> Hand:
        """See `SequentialGame.after`."""
        if not state.cards:
            return Hand(cast(tuple[int, int], action), state.public, state.rounds)
        if self.mover(state) == CHANCE:
            return Hand(state.cards, cast(int, action), (*state.rounds, ""))
        return Hand(state.cards, state.public, (*state.rounds[:-1], state.rounds[-1] + cast(str, action)))

    def information(self, state: Hand) -> View:
        """See `SequentialGame.information`."""
        return View(state.cards[self.mover(state)], state.public, state.rounds)

    def returns(self, state: Hand) -> tuple[float, float]:
        """Antes won by each player; they sum to 0."""
        paid = self.paid(state)
        if state.rounds[-1].endswith(FOLD):
            loser = (len(state.rounds[-1]) - 1) % 2
        else:
            strength = [(self.rank(card) == self._table(state), self.rank(card)) for card in state.cards]
            if strength[FIRST] == strength[SECOND]:
                return (0.0, 0.0)
            loser = strength.index(min(strength))
        return (
            (-float(paid[loser]), float(paid[loser])) if loser == FIRST else (float(paid[loser]), -float(paid[loser]))
        )

    def paid(self, state: Hand) -> tuple[int, int]:
        """Antes each player has put into the pot."""
        paid = [1, 1]
        for bet, moves in zip(self.bets, state.rounds, strict=False):
            for turn, move in enumerate(moves):
                if move != FOLD:
                    paid[turn % 2] = max(paid) + (bet if move == RAISE else 0)
        return paid[0], paid[1]

    def _table(self, state: Hand) -> int | None:
        return None if state.public is None else self.rank(state.public)

    @cached_property
    def stake(self) -> int:
        """The most a player can lose, in antes."""
        return 1 + self.cap * sum(self.bets)

    @property
    def most_moves(self) -> int:
        """Of one player in one round: check, all the raises, and a call, in turns."""
        return (self.cap + 3) // 2

    @cached_property
    def deals(self) -> tuple[Deal, ...]:
        """All deals; each is as likely as any other, so one that is twice as likely stands there twice."""
        counts = Counter(permutations(self.deck, len(self.bets) + 1))
        common = math.gcd(*counts.values())
        return tuple(deal for deal, count in sorted(counts.items()) for _ in range(count // common))

    def dealt(self, state: Hand, deal: Deal) -> Hand:
        """What follows a state where chance moves, when `deal` is what it deals."""
        return self.after(state, deal[:2] if not state.cards else deal[2])


def facing(moves: str) -> bool:
    """Whether the player to move in a round with these moves faces a bet."""
    return moves.endswith(RAISE)


def _closed(moves: str) -> bool:
    return len(moves) > 1 and moves.endswith(CALL)


def _shares(drawn: Sequence[Action]) -> list[tuple[Action, float]]:
    return [(action, count / len(drawn)) for action, count in Counter(drawn).items()]


KUHN: Final = PokerRules(deck=(0, 1, 2), bets=(1,), cap=1, value=-1 / 18)
LEDUC: Final = PokerRules(deck=(0, 0, 1, 1, 2, 2), bets=(2, 4), cap=2, value=-0.0856064)
