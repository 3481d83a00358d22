"""How many calls a server should be given at once, learnt from what they cost.

A server runs some calls side by side and queues the rest. Up to that point more calls at once mean more answers a
second (X grows with L); past it they only wait there, where they cannot be given to somebody else any more. By
Little's law X = L / R, so the mean latency R of calls sent while L were kept in flight is a measurement of X(L):

    grow     double L while X grows with it: X(2L) >= 2^ELASTICITY * X(L)
    shrink   when the very first doubling gains nothing, halve L while X does not fall
    hold     at the knee, which two measurements give: below it X = L / R, above it X is flat
    look     now and then a little higher or lower than held, and stay there if that is as good; grow anew when
             latency has doubled

A measurement is taken of a cohort: the first max(L, 8) calls *sent* at L, all of them awaited, because the first to
*finish* are the short ones. Each counts with the calls under way when it was sent: those that fill a limit just raised
meet shorter queues. Only calls sent while the server was at least half full count: what is never full needs no limit.
After the idea of Netflix's concurrency-limits (Vegas, Gradient2), which watch latency alone; a batching GPU answers
more slowly and yet does more, so throughput decides here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

FIRST = 8
"""Calls at once before anything is known; a server that batches at all takes these."""
ELASTICITY = 0.25
"""Least d log X / d log L at which more calls at once are worth having."""
HEADROOM = 1.25
"""Above the knee, so that the server always has the next call at hand."""
LOOK_EVERY = 8
"""Cohorts between tries of another limit."""
HIGHER, LOWER = 1.5, 0.7
"""How far such a try goes."""


class _Phase(StrEnum):
    GROW = "grow"
    SHRINK = "shrink"
    HOLD = "hold"
    LOOK = "look"


@dataclass(frozen=True, slots=True)
class Sent:
    """A call under way, as a limit saw it leave."""

    cohort: int | None
    """None: not measured."""
    in_flight: int


class Limit:
    """The limit of one server: `value` calls at once, between 1 and `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.value = min(FIRST, most)
        self._phase = _Phase.GROW
        self.pace: float | None = None
        """Seconds between answers, when last measured: a call behind n others is done no sooner than (n + 1) of it."""
        self._known: tuple[float, float] | None = None
        """Calls under way when last measured and answers a second then, which the next is compared with."""
        self._held = 0
        """The limit to go back to when a look finds nothing better."""
        self._held_latency: float | None = None
        """At the first cohort held."""
        self._held_cohorts: list[tuple[float, float]] = []
        """Load and rate of each since the last look."""
        self._higher = False
        """Whether the last look went up."""
        self._first = False
        """Whether the step being measured is the first from where growing began."""
        self._cohort = 0
        self._begin()

    def _begin(self) -> None:
        self._cohort += 1
        self._wanted = max(self.value, FIRST) * (2 if self._phase is _Phase.LOOK else 1)
        self._open = 0
        self._seconds = 0.0
        self._weight = 0.0
        self._answered = 0
        self._in_flight = 0

    def sent(self, in_flight: int) -> Sent:
        """A call leaves; `in_flight` counts it. Give the result to `done` or `dropped`."""
        # a limit just doubled is filled within the instant, so half full counts as full
        if self._wanted == 0 or 2 * in_flight <= self.value:
            return Sent(None, in_flight)
        self._wanted -= 1
        self._open += 1
        return Sent(self._cohort, in_flight)

    def done(self, sent: Sent, latency_s: float, weight: float) -> None:
        """That call was answered after `latency_s`; `weight` is its size."""
        if sent.cohort == self._cohort:
            self._open -= 1
            self._seconds += latency_s
            self._weight += weight
            self._answered += 1
            self._in_flight += sent.in_flight
            self._end_cohort()

    def dropped(self, sent: Sent) -> None:
        """That call failed or was cancelled: its time says nothing."""
        if sent.cohort == self._cohort:
            self._open -= 1
            self._end_cohort()

    def overloaded(self) -> None:
        """The server refused a call because it is full."""
        self._settle(max(1, self.value // 2))

    def queued(self, waiting: int) -> None:
        """The server says `waiting` of the calls it was given have not begun."""
        if waiting > max(1, self.value // 4):
            self._settle(max(1, self.value - waiting))

    def _settle(self, value: int) -> None:
        self.value = max(1, min(value, self.most))
        self._phase = _Phase.HOLD
        self._known = None
        self._held_latency = None
        self._held_cohorts = []
        self._begin()

    def _end_cohort(self) -> None:
        if self._wanted or self._open:
            return
        if self._weight > 0 and self._seconds > 0:
            # the units of weight are the caller's: as many seconds as a call of weight 1 takes
            self._judge(self._in_flight / self._answered, self._seconds / self._weight)
        self._begin()

    def _judge(self, load: float, latency: float) -> None:
        """`load`: mean calls under way; `latency`: mean seconds of a call of weight 1 then."""
        rate = load / latency
        self.pace = 1 / rate
        if self._phase is _Phase.HOLD:
            self._hold(load, latency)
        elif self._phase is _Phase.LOOK:
            self._look(load, rate)
        elif self._phase is _Phase.GROW:
            self._grow(load, rate)
        else:
            self._shrink(load, rate)

    def _grow(self, load: float, rate: float) -> None:
        before, self._known = self._known, (load, rate)
        if before is None or _gains(before, (load, rate)):
            if self.value == self.most:
                self._settle(self.most)
            else:
                self.value = min(2 * self.value, self.most)
        elif self._first and before[0] > 1:
            # the first step already gained nothing: the knee may lie below the beginning
            self._known = before
            self.value = max(1, int(before[0]) // 2)
            self._phase = _Phase.SHRINK
        else:
            self._settle(_knee(before, rate, self.value))
        self._first = before is None

    def _shrink(self, load: float, rate: float) -> None:
        assert self._known is not None
        above, above_rate = self._known
        if self.value > 1 and not _gains((load, rate), self._known):
            self._known = (load, rate)
            self.value //= 2
        else:
            self._settle(_knee((load, rate), above_rate, int(above)))

    def _hold(self, load: float, latency: float) -> None:
        if self._held_latency is None:
            self._held_latency = latency
        self._held_cohorts.append((load, load / latency))
        if latency > 2 * self._held_latency:
            self._settle(self.value // 2)
            self._phase = _Phase.GROW
        elif len(self._held_cohorts) >= LOOK_EVERY:
            self._held = self.value
            self._higher = not self._higher
            self.value = max(1, min(self.most, round(self.value * (HIGHER if self._higher else LOWER))))
            self._phase = _Phase.LOOK

    def _look(self, load: float, rate: float) -> None:
        count = len(self._held_cohorts)
        held = (sum(c[0] for c in self._held_cohorts) / count, sum(c[1] for c in self._held_cohorts) / count)
        if self._higher and _gains(held, (load, rate)) and self.value < self.most:
            self._known = (load, rate)
            self._first = False
            self._phase = _Phase.GROW
            self.value = min(2 * self.value, self.most)
        elif self._higher:
            self._settle(self._held)
        else:
            self._settle(self._held if _gains((load, rate), held) else self.value)


def _gains(low: tuple[float, float], high: tuple[float, float]) -> bool:
    """Whether going from one (load, rate) to a higher load is worth it."""
    least: float = (high[0] / low[0]) ** ELASTICITY
    return high[1] >= low[1] * least


def _knee(below: tuple[float, float], rate: float, above: int) -> int:
    """Where X = L / R through `below` meets the flat `rate` measured at `above`, and a little more."""
    load, below_rate = below
    return int(min(above, math.ceil(HEADROOM * load * max(1.0, rate / below_rate))))
