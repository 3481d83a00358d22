"""How many calls a server should be given at once, learnt from what they cost.

A server runs some calls side by side and queues the rest. Up to that knee more calls at once mean more answers a second
(X grows with L); past it they only wait there, where they cannot be given to somebody else any more. By Little's law
X = L / R, so the mean latency R of calls sent while L were under way is a measurement of X(L).

    grow     double L while X grows with it: X(2L) >= 2^ELASTICITY * X(L)
    shrink   when the very first doubling gains nothing, halve L while X does not fall
    hold     HEADROOM times the knee, which is X times the least R measured on the way
    look     now and then higher than held, and grow from there if that gains; grow anew when latency has doubled

A measurement is taken of a cohort: the first max(L, 8) calls *sent* at L, all of them awaited, because the first to
*finish* are the short ones. Each counts with the calls under way when it was sent: those that fill a limit just raised
meet shorter queues. Only calls sent while the server was at least half full count: what is never full needs no limit.

The knee is the bandwidth-delay product of BBR (Cardwell et al. 2016); the limit as such is the idea of Netflix's
concurrency-limits, which watch latency alone. A batching GPU answers more slowly and yet does more, so here throughput
decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

FIRST = 8
"""Calls at once before anything is known; a server that batches at all takes these."""
ELASTICITY = 0.25
"""Least d log X / d log L at which more calls at once are worth having."""
HEADROOM = 2.0
"""Over the knee, so that the server has the next call at hand when this process or the network is late by as long as a
call takes. It is cheap: `pace` tells how long a call would wait there, so the last ones go elsewhere all the same."""
LOOK_EVERY = 8
"""Cohorts between tries of a higher limit."""
HIGHER = 1.5
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


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of one cohort, or of several."""

    load: float
    """Mean calls under way."""
    latency: float
    """Mean seconds of a call of weight 1."""

    @property
    def rate(self) -> float:
        """Weight a second."""
        return self.load / self.latency


class Limit:
    """The limit of one server: `value` calls at once, between 1 and `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.value = min(FIRST, most)
        self.pace: float | None = None
        """Seconds between answers, when last measured: a call behind n others is done no sooner than (n + 1) of it."""
        self._phase = _Phase.GROW
        self._known: _Measured | None = None
        """What the next measurement is compared with."""
        self._least: float | None = None
        """Latency, since growing began: of a call that hardly waits there."""
        self._floor = 0.0
        """A load that was found worth having; the limit held is not below."""
        self._held: list[_Measured] = []
        """Since the last look."""
        self._first_held: float | None = None
        """Latency when holding began."""
        self._cohort = 0
        self._begin()

    # -- calls ----------------------------------------------------------------------------------------------------

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
        self._settle(self.value // 2)

    def queued(self, running: float, waiting: float) -> None:
        """The server says that of the calls it was given so many run and so many have not begun."""
        if waiting > (HEADROOM - 1) * max(1.0, running):
            self._settle(min(self.value, math.ceil(HEADROOM * running)))

    # -- measurements ---------------------------------------------------------------------------------------------

    def _end_cohort(self) -> None:
        if self._wanted or self._open:
            return
        if self._weight > 0 and self._seconds > 0:
            self._judge(_Measured(self._in_flight / self._answered, self._seconds / self._weight))
        self._begin()

    def _judge(self, now: _Measured) -> None:
        self.pace = 1 / now.rate
        match self._phase:
            case _Phase.HOLD:
                self._hold(now)
            case _Phase.LOOK:
                self._look(now)
            case _Phase.GROW:
                self._grow(now)
            case _Phase.SHRINK:
                self._shrink(now)

    def _grow(self, now: _Measured) -> None:
        before, first = self._known, self._least is None
        self._least = min(now.latency, self._least or now.latency)
        if before is None or _gains(before, now):
            self._known, self._floor = now, now.load
            if self.value == self.most:
                self._settle(self.most)
            self.value = min(2 * self.value, self.most)
        elif not first and self._floor == before.load and self.value <= 2 * FIRST and self.value > 1:
            # the first step already gained nothing: the knee may lie below the beginning
            self._phase, self._floor = _Phase.SHRINK, 0.0
            self.value = max(1, self.value // 4)
        else:
            self._settle(self._knee(now))

    def _shrink(self, now: _Measured) -> None:
        assert self._known is not None
        assert self._least is not None
        above, self._least = self._known, min(self._least, now.latency)
        if self.value > 1 and not _gains(now, above):
            self._known = now
            self.value //= 2
        else:
            self._settle(self._knee(above))

    def _knee(self, full: _Measured) -> int:
        """The limit to hold, where `full` is a measurement past the knee."""
        assert self._least is not None
        return math.ceil(max(self._floor, HEADROOM * full.rate * self._least))

    def _settle(self, value: int) -> None:
        self.value = max(1, min(value, self.most))
        self._phase = _Phase.HOLD
        self._held = []
        self._first_held = None
        self._begin()

    def _hold(self, now: _Measured) -> None:
        self._held.append(now)
        if self._first_held is None:
            self._first_held = now.latency
        if now.latency > 2 * self._first_held:
            self._known = self._least = None
            self._floor = 0.0
            self._phase = _Phase.GROW
            self.value = max(1, self.value // 2)
        elif len(self._held) >= LOOK_EVERY and self.value < self.most:
            self._floor = float(self.value)
            self._phase = _Phase.LOOK
            self.value = min(self.most, math.ceil(HIGHER * self.value))

    def _look(self, now: _Measured) -> None:
        count = len(self._held)
        held = _Measured(sum(m.load for m in self._held) / count, sum(m.latency for m in self._held) / count)
        if _gains(held, now) and self.value < self.most:
            self._known = now
            self._least = self._least or held.latency
            self._phase = _Phase.GROW
            self.value = min(2 * self.value, self.most)
        else:
            self._settle(self.value if _gains(held, now) else int(self._floor))


def _gains(low: _Measured, high: _Measured) -> bool:
    """Whether going from one load to a higher one is worth it."""
    least: float = (high.load / low.load) ** ELASTICITY
    return high.rate >= low.rate * least
