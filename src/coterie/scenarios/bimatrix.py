"""Two-player games as numbers: payoffs, repeated play as a Markov chain over remembered rounds, best responses.

    history (the last `memory` joint actions) --both choose--> joint action --> payoffs, next history

A policy maps every history to probabilities of the seat's own actions. Nothing here samples or knows of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final

from coterie.errors import ScenarioError

JointAction = tuple[int, int]
"""(row's action, column's action)."""
History = tuple[JointAction, ...]
"""Remembered rounds, oldest first."""
Policy = Mapping[History, Sequence[float]]
"""Probabilities of one seat's actions after each history."""

MAX_HISTORIES: Final = 4096
"""Most histories an exact computation asks the policies about."""


@dataclass(frozen=True)
class Bimatrix:
    """A game for a row and a column player."""

    name: str
    actions: tuple[str, ...]
    """Names, shared by both players; as many as the player with more actions has."""
    payoffs: tuple[tuple[tuple[float, float], ...], ...]
    """payoffs[i][j]: (row's, column's)."""
    cooperative: int | None = None
    """The action that counts as cooperation, if one does."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many actions row and column have."""
        return len(self.payoffs), len(self.payoffs[0])

    @property
    def joint_actions(self) -> list[JointAction]:
        rows, columns = self.shape
        return list(product(range(rows), range(columns)))

    @property
    def symmetric(self) -> bool:
        """Whether both players have the same rules: swapping the actions swaps the payoffs."""
        rows, columns = self.shape
        return rows == columns and all(self.payoffs[i][j] == self.payoffs[j][i][::-1] for i, j in self.joint_actions)

    @property
    def best_joint_payoff(self) -> float:
        return max(sum(self.payoffs[i][j]) for i, j in self.joint_actions)

    def normalised(self, payoff: float) -> float:
        """Move a payoff to [0, 1] by the least and greatest payoff of either player.

        Raises:
            ZeroDivisionError: all payoffs are the same; there is nothing to play for.
        """
        every = [value for i, j in self.joint_actions for value in self.payoffs[i][j]]
        return min(1.0, max(0.0, (payoff - min(every)) / (max(every) - min(every))))

    def expected(self, frequencies: Mapping[JointAction, float]) -> tuple[float, float]:
        """Payoffs of row and column, weighted by how often each joint action is played."""
        row = sum(share * self.payoffs[i][j][0] for (i, j), share in frequencies.items())
        column = sum(share * self.payoffs[i][j][1] for (i, j), share in frequencies.items())
        return row, column


GAMES: Final[Mapping[str, Bimatrix]] = {
    game.name: game
    for game in (
        # Payoffs of Axelrod, The Evolution of Cooperation (1984): temptation 5, reward 3, punishment 1, sucker 0.
        Bimatrix("prisoners_dilemma", ("cooperate", "defect"), (((3, 3), (0, 5)), ((5, 0), (1, 1))), cooperative=0),
        # A stag pays 4 to each but takes both, a hare pays 3 to whoever hunts one. (stag, stag) is payoff dominant and
        # (hare, hare) risk dominant in the sense of Harsanyi and Selten (1988): hare is better below P(stag) = 3/4.
        Bimatrix("stag_hunt", ("stag", "hare"), (((4, 4), (0, 3)), ((3, 0), (3, 3))), cooperative=0),
        # Zero-sum: row wants to match, column not to. The one equilibrium is half and half.
        Bimatrix("matching_pennies", ("heads", "tails"), (((1, -1), (-1, 1)), ((-1, 1), (1, -1)))),
        # Zero-sum and symmetric: each action beats one other and loses to the third. In equilibrium each has a third.
        Bimatrix(
            "rock_paper_scissors",
            ("rock", "paper", "scissors"),
            (((0, 0), (-1, 1), (1, -1)), ((1, -1), (0, 0), (-1, 1)), ((-1, 1), (1, -1), (0, 0))),
        ),
        # Pure coordination (Schelling, 1960): either convention will do.
        Bimatrix("coordination", ("first", "second"), (((1, 1), (0, 0)), ((0, 0), (1, 1)))),
    )
}


def remembered(rounds: History, memory: int) -> History:
    """The last `memory` of `rounds`."""
    return rounds[max(0, len(rounds) - memory) :]


def histories(game: Bimatrix, rounds: int, memory: int) -> list[History]:
    """Every history a player may be shown in `rounds` rounds, shortest first.

    Raises:
        ScenarioError: there are more than `MAX_HISTORIES`.
    """
    longest = min(memory, rounds - 1)
    count = sum(len(game.joint_actions) ** length for length in range(longest + 1))
    if count > MAX_HISTORIES:
        raise ScenarioError(
            f"game {game.name!r}: {count} histories of up to {longest} rounds are too many to compute exactly "
            f"(at most {MAX_HISTORIES}); lower memory or rounds, or measure by playing episodes"
        )
    return [history for length in range(longest + 1) for history in product(game.joint_actions, repeat=length)]


def occupancy(game: Bimatrix, row: Policy, column: Policy, rounds: int, memory: int) -> dict[JointAction, float]:
    """Expected share of the rounds each joint action is played in; sums to 1."""
    shares = dict.fromkeys(game.joint_actions, 0.0)
    reached: dict[History, float] = {(): 1.0}
    for _ in range(rounds):
        following: dict[History, float] = {}
        for history, probability in reached.items():
            for i, j in game.joint_actions:
                weight = probability * row[history][i] * column[history][j]
                shares[i, j] += weight / rounds
                then = remembered((*history, (i, j)), memory)
                following[then] = following.get(then, 0.0) + weight
        reached = following
    return shares


def best_response(game: Bimatrix, opponent: Policy, player: int, rounds: int, memory: int) -> float:
    """The most `player` (0: row, 1: column) can earn a round, in expectation, against a fixed opponent.

    By backward induction over (round, history). Since the opponent sees nothing but the history, no player that
    remembers more could earn more.
    """
    own_actions = range(game.shape[player])

    @cache
    def best_from(played: int, history: History) -> float:
        if played == rounds:
            return 0.0
        return max(
            sum(
                probability
                * (game.payoffs[i][j][player] + best_from(played + 1, remembered((*history, (i, j)), memory)))
                for theirs, probability in enumerate(opponent[history])
                for i, j in [(own, theirs) if player == 0 else (theirs, own)]
            )
            for own in own_actions
        )

    return best_from(0, ()) / rounds


def nash_conv(game: Bimatrix, row: Policy, column: Policy, rounds: int, memory: int) -> float:
    """Sum over both players of what a best response would gain a round (Lanctot et al., 2017); 0 in equilibrium."""
    payoffs = game.expected(occupancy(game, row, column, rounds, memory))
    gains = (
        best_response(game, column, 0, rounds, memory) - payoffs[0],
        best_response(game, row, 1, rounds, memory) - payoffs[1],
    )
    return sum(max(0.0, gain) for gain in gains)  # rounding may leave -1e-17
