"""Two sides meet several times; whoever wins more of the meetings wins the game.

    one meeting: P(margin) for margin -1, 0, 1   --added up over independent meetings-->   P(win), P(draw), P(loss)

Sides are named "red" and "blue"; a seat's name begins with its side's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from coterie.types import SeatId

SIDES: Final = ("red", "blue")


class Odds(NamedTuple):
    """Of the first side; they sum to 1."""

    win: float
    draw: float
    loss: float


def sign(number: float) -> int:
    """-1, 0 or 1."""
    return (number > 0) - (number < 0)


def odds(meeting: Odds, meetings: int) -> Odds:
    """The odds of winning more than the other side in this many independent meetings alike.

    Raises:
        ValueError: there is not at least one meeting.
    """
    if meetings < 1:
        raise ValueError(f"a contest needs at least one meeting, got {meetings}")
    margins = {0: 1.0}
    for _ in range(meetings):
        after: dict[int, float] = {}
        for margin, probability in margins.items():
            for change, chance in zip((1, 0, -1), meeting, strict=True):
                after[margin + change] = after.get(margin + change, 0.0) + probability * chance
        margins = after
    return Odds(
        sum(p for margin, p in margins.items() if margin > 0),
        margins.get(0, 0.0),
        sum(p for margin, p in margins.items() if margin < 0),
    )


def figures(game: Odds) -> dict[str, float]:
    """The odds under the names all contests share: ``red_wins``, ``blue_wins``, ``draws``."""
    return {"red_wins": game.win, "blue_wins": game.loss, "draws": game.draw}


def won(red: float, blue: float) -> Odds:
    """The odds of a game that is over, by what each side reached."""
    outcome = sign(round(red - blue, 12))
    return Odds(float(outcome > 0), float(outcome == 0), float(outcome < 0))


def by_seat(seats: Sequence[SeatId], value: Mapping[str, float]) -> dict[SeatId, float]:
    """Each seat's figure is that of its side."""
    return {seat: value[seat.partition("_")[0]] for seat in seats}
