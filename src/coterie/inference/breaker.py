"""A circuit breaker: stop calling what does not answer, and find out when it does again.

    CLOSED --threshold failures in a row, or a trip--> OPEN --its pause is over and it looks well--> HALF_OPEN
       ^                                                 ^                                              |
       +-- any success                                   +--- the trial call failed, pause doubled -----+

The breaker is pure: it is told what happened and when, and holds no timer and no clock of its own.
Source: M. Nygard, Release It!, 2nd ed., "Circuit Breaker".
"""

from __future__ import annotations

from enum import StrEnum


class BreakerState(StrEnum):
    """CLOSED: calls go through. OPEN: none does. HALF_OPEN: one at a time does, as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Of one server.

    Args:
        threshold: failures in a row that open it.
        pause_s: seconds it stays open the first time; doubled each time the server is still not well.
        longest_pause_s: bound of that doubling, in seconds.
    """

    def __init__(self, *, threshold: int = 3, pause_s: float = 1.0, longest_pause_s: float = 30.0) -> None:
        self.threshold = threshold
        self.first_pause_s = pause_s
        self.longest_pause_s = longest_pause_s
        self.state = BreakerState.CLOSED
        self.failures = 0
        """In a row."""
        self.until = 0.0
        """When an open breaker may be looked at again, on the clock of those who tell it."""
        self._pause_s = pause_s

    def succeeded(self) -> None:
        """A call was answered, whatever the answer: closes the breaker and forgets the failures."""
        self.state = BreakerState.CLOSED
        self.failures = 0
        self._pause_s = self.first_pause_s

    def failed(self, now: float) -> bool:
        """A call failed at `now`. Returns whether this opened the breaker."""
        self.failures += 1
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED and self.failures >= self.threshold
        ):
            self.trip(now)
            return True
        return False

    def trip(self, now: float) -> None:
        """Open at `now`, because it is known that the server is not well. Opening again doubles the pause."""
        self.state = BreakerState.OPEN
        self.until = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, self.longest_pause_s)

    def half_open(self) -> None:
        """The pause is over and the server looks well: let one call try."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN
