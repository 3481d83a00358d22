"""Places at servers: who gets the next one, and what becomes of those for whom there is none.

    take -> Line -> give_out: Router picks a Member with a free place -> the call -> give_back -> give_out …

Whoever took a place gives it back, once. A waiter that is cancelled, or whose time is up, leaves the line; if it was
given a place in that very moment, the place goes on to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coterie.errors import EngineError
from coterie.inference.breaker import BreakerState
from coterie.inference.line import Line, Ticket
from coterie.inference.residency import Residency
from coterie.inference.routing import Member, Router

LOOK_AGAIN_S = 0.01
"""Least time between looks at places that were kept free."""


class NoServers(EngineError):  # noqa: N818 - what there is, said as an exception
    """No server of the pool can serve a call in time."""


class Places:
    """Of a pool; `members` is the pool's own mapping, by name."""

    def __init__(
        self, members: dict[str, Member], residency: Residency, router: Router, clock: Callable[[], float]
    ) -> None:
        self._members = members
        self._residency = residency
        self._router = router
        self._clock = clock
        self._line = Line()
        self._again: asyncio.TimerHandle | None = None
        self._closed = False

    def enter(self) -> None:
        """A new event loop: nobody of the old one waits any more."""
        self._line = Line()
        self._again = None

    def close(self) -> None:
        """Send away all that wait, and all that come."""
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self.changed()

    async def take(self, ticket: Ticket) -> Member:
        """Wait for a place. Raises `NoServers`."""
        able = self.able(ticket)
        if self._closed or not able:
            self._give_up_if_hopeless(ticket)
        if able and not self._line.blocks(ticket):
            member = self._choose(ticket, able, len(self._line) + 1)
            if member is not None:
                return member
        loop = asyncio.get_running_loop()
        ticket.place = loop.create_future()
        self._line.add(ticket)
        alarm = loop.call_later(max(0.0, ticket.deadline - self._clock()), self._too_late, ticket)
        try:
            return await ticket.place
        except asyncio.CancelledError:
            # the place may have been given in the same moment
            if ticket.place.done() and not ticket.place.cancelled() and ticket.place.exception() is None:
                self.give_back(ticket.place.result())
            raise
        finally:
            alarm.cancel()
            self._line.remove(ticket)

    def _too_late(self, ticket: Ticket) -> None:
        if not ticket.place.done():
            ticket.place.set_exception(NoServers(f"no server took the call in time ({self._why()})"))

    def give_back(self, member: Member) -> None:
        """A call there ended, however."""
        member.in_flight -= 1
        if not member.in_flight:
            member.trial = False
            if member.draining and self._members.get(member.name) is member:
                del self._members[member.name]
        self.give_out()

    def present(self) -> list[Member]:
        """Members that are neither retired nor leaving."""
        return [m for m in self._members.values() if m.retired is None and not m.draining]

    def able(self, ticket: Ticket) -> list[Member]:
        """Members this call may go to now, full ones included."""
        now = self._clock()
        able = [m for m in self._members.values() if m.serves(now)]
        if ticket.never:
            able = [m for m in able if m.name not in ticket.never]
        if ticket.avoid:
            able = [m for m in able if m.name not in ticket.avoid] or able
        return self._residency.fit(able, ticket.needs)

    def give_out(self) -> None:
        """Give every free place to somebody who may use it."""
        if not len(self._line):
            return
        blocked: set[str | None] = set()
        while (front := self._line.next(blocked)) is not None:
            key, tickets = front
            for ticket in tickets:
                if ticket.place.done():
                    self._line.remove(ticket)
                    break
                member = self._choose(ticket, self.able(ticket), len(self._line))
                if member is not None:
                    self._line.remove(ticket)
                    ticket.place.set_result(member)
                    break
            else:
                blocked.add(key)

    def _choose(self, ticket: Ticket, able: list[Member], waiting: int) -> Member | None:
        """A member with a place for `ticket`, the place taken; None: there is none for it."""
        member = self._router.choose(able, waiting, ticket.prefix, self._clock())
        if member is None:
            if any(m.places(learnt=True) > 0 for m in able):
                self._look_later()
            return None
        if not member.in_flight:
            member.busy_since = self._clock()
        member.in_flight += 1
        member.trial = member.breaker.state is BreakerState.HALF_OPEN
        return member

    def _look_later(self) -> None:
        """A place was kept free because faster servers would be sooner; see in a while whether they were."""
        if self._again is not None or self._closed:
            return
        known = [m.latency.mean for m in self._members.values() if m.latency.mean is not None]

        def again() -> None:
            self._again = None
            self.give_out()

        delay = max(LOOK_AGAIN_S, min(known, default=0.0))
        self._again = asyncio.get_running_loop().call_later(delay, again)

    def changed(self) -> None:
        """A server became usable or unusable: send away those who wait in vain, and give out what is free."""
        for ticket in self._line:
            if not ticket.place.done():
                try:
                    self._give_up_if_hopeless(ticket)
                except NoServers as error:
                    ticket.place.set_exception(error)
        self.give_out()

    def _give_up_if_hopeless(self, ticket: Ticket) -> None:
        if self._closed:
            raise NoServers("the pool is closed")
        now = self._clock()
        left = [m for m in self.present() if m.name not in ticket.never]
        soonest = min(
            (max(m.paused_until, m.breaker.until if m.breaker.state is BreakerState.OPEN else now) for m in left),
            default=float("inf"),
        )
        out = all(m.breaker.state is BreakerState.OPEN for m in left)
        if soonest >= ticket.deadline or (out and not ticket.patient):
            raise NoServers(f"no server can take the call ({self._why()})")

    def _why(self) -> str:
        if not self._members:
            return "the pool has none; give servers under [inference] in the config"
        now = self._clock()
        return "; ".join(f"{m.name}: {_condition(m, now)}" for m in self._members.values())


def _condition(member: Member, now: float) -> str:
    if member.retired is not None:
        return member.retired
    if member.draining:
        return "removed"
    if member.breaker.state is BreakerState.OPEN:
        return f"out after {member.breaker.failures} failures, looked at again in {member.breaker.until - now:.1f} s"
    if member.paused_until > now:
        return f"asked for a pause of {member.paused_until - now:.1f} s more"
    return f"{member.in_flight} calls under way"
