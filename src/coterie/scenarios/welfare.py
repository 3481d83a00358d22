"""How a group did: figures of a vector of payoffs, one for each player, none of them negative.

    equality = 1 - Gini,    Gini = sum over pairs i, j of |x_i - x_j| / (2 n sum of x)

Equality is 1 when all have the same and 1 / n when one has everything. It does not change when all payoffs are
multiplied by the same number or when players change places.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from coterie.types import Seat, SeatId


def gini(payoffs: Sequence[float]) -> float:
    """The Gini coefficient, 0 .. 1 - 1 / n; 0 where nobody has anything.

    Raises:
        ValueError: there are no payoffs, or one is negative.
    """
    if not payoffs or min(payoffs) < 0:
        raise ValueError(f"the Gini coefficient is of payoffs of at least 0, got {list(payoffs)}")
    n, total = len(payoffs), math.fsum(payoffs)
    if total == 0:
        return 0.0
    # sorted upwards, the i-th of n is greater than i others and smaller than n - 1 - i
    spread = math.fsum((2 * i - n + 1) * payoff for i, payoff in enumerate(sorted(payoffs)))
    return max(0.0, spread / (n * total))


def equality(payoffs: Sequence[float]) -> float:
    """1 - Gini (Perolat et al., 2017, arXiv 1707.06600). Raises `ValueError` as `gini` does."""
    return 1.0 - gini(payoffs)


def normalised(value: float, least: float, greatest: float) -> float:
    """`value` moved to [0, 1], where `least` is 0 and `greatest` is 1.

    Raises:
        ValueError: there is nothing between the two.
    """
    if not greatest > least:
        raise ValueError(f"nothing lies between {least} and {greatest}; there is nothing to play for")
    return min(1.0, max(0.0, (value - least) / (greatest - least)))


def alike(names: Sequence[SeatId], means: Sequence[Hashable] | None = None) -> list[Seat]:
    """Seats that differ in their `means` alone: each is marked symmetric with the first that has the same."""
    first: dict[Hashable, SeatId] = {}
    seats = []
    for name, own in zip(names, means or [None] * len(names), strict=True):
        seats.append(Seat(name, symmetric_with=first.get(own)))
        first.setdefault(own, name)
    return seats
