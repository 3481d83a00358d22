"""Who of the servers is there: says so, in a line of text, when one goes away or comes back.

server gpu2:8000 is away (connection: Connection refused); answering: 3 of 4
server gpu2:8000 is back; answering: 4 of 4
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from coterie.inference.breaker import BreakerState
from coterie.inference.routing import Member

QUIET_S = 30.0
"""Nothing more is said of a server for so long, so that one that comes and goes does not fill the screen."""


class RollCall:
    """Of a pool.

    Args:
        members: the pool's own mapping, by name.
        tell: gets the lines (an observer's `note`).
    """

    def __init__(self, members: Mapping[str, Member], clock: Callable[[], float], tell: Callable[[str], None]) -> None:
        self._members = members
        self._clock = clock
        self._tell = tell
        self._away: set[str] = set()
        """Servers last said to be away."""
        self._quiet_until: dict[str, float] = {}

    def look(self) -> None:
        """Say what has changed since it was last said."""
        present = [member for member in self._members.values() if not member.draining]
        self._away.intersection_update(member.name for member in present)
        for member in present:
            if member.retired is None and member.breaker.state is BreakerState.HALF_OPEN:
                continue  # it is being tried
            if member.closed is not (member.name in self._away):
                continue
            now = self._clock()
            if now < self._quiet_until.get(member.name, -math.inf):
                continue
            self._quiet_until[member.name] = now + QUIET_S
            count = f"answering: {sum(other.closed for other in present)} of {len(present)}"
            if member.closed:
                self._away.discard(member.name)
                self._tell(f"server {member.name} is back; {count}")
            else:
                self._away.add(member.name)
                self._tell(f"server {member.name} is away ({member.retired or member.why}); {count}")
