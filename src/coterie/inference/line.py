"""The line of calls that wait for a place at a server.

One line per adapter needed, because those who need another adapter may be served by other servers; between the lines
and within each, first come, first served. A call whose server failed stands in line again where it stood before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.inference.routing import Member


@dataclass(slots=True, eq=False)
class Ticket:
    """One call to the pool."""

    number: int
    """In order of arrival."""
    needs: str | None
    prefix: int | None
    weight: float
    deadline: float
    """On the pool's clock."""
    patient: bool
    """Whether it waits for servers that are out to come back."""
    avoid: set[str] = field(default_factory=set)
    """Servers that failed this call, to be asked again only when no other can."""
    never: set[str] = field(default_factory=set)
    """Servers that cannot serve this call at all."""
    place: asyncio.Future[Member] = field(init=False)


class Line:
    """Tickets that wait."""

    def __init__(self) -> None:
        self._groups: dict[str | None, deque[Ticket]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Ticket]:
        for group in list(self._groups.values()):
            yield from list(group)

    def add(self, ticket: Ticket) -> None:
        """Stand in line, by number."""
        group = self._groups.setdefault(ticket.needs, deque())
        self._length += 1
        if not group or group[-1].number < ticket.number:
            group.append(ticket)
            return
        ahead = next(i for i, other in enumerate(group) if other.number > ticket.number)
        group.insert(ahead, ticket)

    def remove(self, ticket: Ticket) -> None:
        """Leave the line; nothing happens when it is not in it."""
        group = self._groups.get(ticket.needs)
        if group is None or ticket not in group:
            return
        group.remove(ticket)
        self._length -= 1
        if not group:
            del self._groups[ticket.needs]

    def blocks(self, ticket: Ticket) -> bool:
        """Whether somebody waits already who could go wherever `ticket` may."""
        return any(not t.avoid and not t.never for t in self._groups.get(ticket.needs, ()))

    def next(self, blocked: set[str | None]) -> tuple[str | None, list[Ticket]] | None:
        """Of the groups not `blocked` the one whose first came first: its key, and those of it who are to be tried:
        up to the first for whom every server is alike, for where that one finds no place, nobody behind it does."""
        open_groups = [(group[0].number, key) for key, group in self._groups.items() if key not in blocked]
        if not open_groups:
            return None
        key = min(open_groups, key=lambda pair: pair[0])[1]
        tried = []
        for ticket in self._groups[key]:
            tried.append(ticket)
            if not ticket.avoid and not ticket.never:
                break
        return key, tried
