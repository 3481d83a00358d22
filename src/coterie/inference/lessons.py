"""What the end of a call teaches of its server, and whether the call may be tried again; the table of `wire` in code.

answered                          alive: breaker closed, failures forgotten
REJECTED, MISSING, OVERLOADED     alive too, for it said so
CONNECTION                        counts against it at once
TIMEOUT, SERVER                   perhaps the call's own fault: probed, and counted by what the probe finds
UNAUTHORIZED                      leaves the pool
"""

from __future__ import annotations

from collections.abc import Callable

from coterie.inference.line import Ticket
from coterie.inference.places import Places
from coterie.inference.residency import Residency
from coterie.inference.routing import Member
from coterie.inference.watch import Watch
from coterie.inference.wire import FaultKind, ServerFault

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
"""Of a server that is full and does not say for how long; doubled while it stays so."""


class Lessons:
    """Of a pool."""

    def __init__(self, places: Places, residency: Residency, watch: Watch, clock: Callable[[], float]) -> None:
        self._places = places
        self._residency = residency
        self._watch = watch
        self._clock = clock

    def answered(self, member: Member) -> None:
        """`member` said something, which shows that it lives."""
        member.breaker.succeeded()
        member.trial = False
        member.last_answer = self._clock()
        member.unwell_since = None
        member.pause_s = 0.0

    def failed(self, member: Member, ticket: Ticket, fault: ServerFault, sent: float) -> bool:
        """Learn from `fault` of a call that left at `sent`; whether it may be tried again."""
        member.why = fault.reason
        match fault.kind:
            case FaultKind.REJECTED:
                self.answered(member)
                return False
            case FaultKind.UNAUTHORIZED:
                member.retired = str(fault)
                self._places.changed()
            case FaultKind.MISSING:
                self.answered(member)
                if ticket.needs is not None:
                    self._residency.lost(member, ticket.needs)
                ticket.never.add(member.name)
                if not any(m.name not in ticket.never for m in self._places.present()):
                    return False
            case FaultKind.OVERLOADED:
                self._pause(member, fault.retry_after_s)
            case FaultKind.TIMEOUT if member.last_answer < sent:
                ticket.avoid.add(member.name)
                self._watch.failed(member)
            case FaultKind.CONNECTION:
                ticket.avoid.add(member.name)
                self._watch.failed(member)
            case FaultKind.TIMEOUT | FaultKind.SERVER:
                ticket.avoid.add(member.name)
                self._watch.suspect(member)
        return self._clock() < ticket.deadline

    def _pause(self, member: Member, asked_s: float) -> None:
        now = self._clock()
        longer = 2 * member.pause_s or FIRST_PAUSE_S
        self.answered(member)
        if member.paused_until <= now:
            # the other calls it refuses in the same moment say nothing new
            member.pause_s = min(longer, LONGEST_PAUSE_S)
            member.limit.overloaded()
        until = now + (asked_s if asked_s > 0 else member.pause_s)
        if until > member.paused_until:
            member.paused_until = until
            self._watch.wake_at(until)
        self._places.changed()
