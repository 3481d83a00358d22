"""Several servers as one: picks one for every call, holds back what they cannot take yet, and survives their failures.

    run(call) -> stands in Line -> Router picks a Member with a free place -> call(server) -> answer
                     ^                                                            | ServerFault
                     +---- again, where it stood, and at another server ----------+

Calls wait here, not in a server's queue, where they could not be given to somebody else any more: a server is given
only as many at once as it works on (`limit`), and a slow one none that faster ones will have done sooner (`routing`).

Invariants, each a test:
- every call of `run` ends in exactly one answer or exactly one error; an answer that arrived is never asked for again;
- no two attempts of a call are ever under way together;
- a place is given back however a call ends, cancellation included, also between being given the place and using it;
- first come, first served, among those who could use the same servers.

The table of faults is in `wire`. A pool lives in one event loop at a time, and may live in several one after the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from coterie.errors import ConfigError, EngineError, nearest
from coterie.inference.breaker import BreakerState
from coterie.inference.lessons import Lessons
from coterie.inference.limit import Limit
from coterie.inference.line import Ticket
from coterie.inference.places import NoServers, Places
from coterie.inference.residency import Loader, Residency
from coterie.inference.roll import RollCall
from coterie.inference.routing import POLICIES, Member, Router, ServerState
from coterie.inference.watch import Watch
from coterie.inference.wire import FaultKind, ServerControl, ServerFault, ServerSpec

__all__ = ["NoServers", "ServerPool", "ServerState"]

T = TypeVar("T")

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0
"""Before a call goes back to servers that all failed it; doubled each time."""


class ServerPool:
    """See the module.

    Args:
        servers: at least none; more can be added later.
        control: asked for health, load and served names.
        policy: how a server is picked, one of `routing.POLICIES`.
        max_in_flight: most calls a server is given at once; load-aware policies learn how many are worth it.
        poll_every_s: seconds between looks at every server, once started.
        seed: of the policy's draws and of jitter.
        clock: seconds, never going back.
        loader: loads an adapter by name on a server; called once at a time per (server, adapter).
        on_change: told in a line of text when a server goes away or comes back.

    Raises:
        ConfigError: no such policy, two servers of one name, or an impossible number.
    """

    def __init__(
        self,
        servers: Sequence[ServerSpec],
        control: ServerControl,
        *,
        policy: str = "power_of_two",
        max_in_flight: int = 64,
        poll_every_s: float = 5.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        loader: Loader | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"unknown policy {policy!r}{nearest(policy, POLICIES)}")
        if max_in_flight < 1 or poll_every_s <= 0:
            raise ConfigError(
                f"max_in_flight must be at least 1 and poll_every_s above 0, not {max_in_flight} and {poll_every_s}"
            )
        self._max_in_flight = max_in_flight
        self._poll_every_s = poll_every_s
        self._clock = clock
        self._rng = random.Random(seed)
        self._members: dict[str, Member] = {}
        self._residency = Residency(self._members, control, clock, loader)
        self._places = Places(self._members, self._residency, Router(policy, self._rng), clock)
        self._roll = RollCall(self._members, clock, on_change) if on_change is not None else None
        self._watch = Watch(self._members, control, self._residency, clock, self._rng, self._changed)
        self._lessons = Lessons(self._places, self._residency, self._watch, clock)
        self._tickets = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = False
        self._closed = False
        for server in servers:
            self.add(server)

    # -- one call -------------------------------------------------------------------------------------------------

    async def run(
        self,
        call: Callable[[ServerSpec, float], Awaitable[T]],
        *,
        needs: str | None = None,
        prefix: int | None = None,
        timeout_s: float = 120.0,
        attempts: int = 8,
        on_fault: Callable[[ServerSpec, ServerFault, float], None] | None = None,
        weight: float = 1.0,
        patient: bool = True,
    ) -> tuple[T, float]:
        """Have `call` done by one server.

        Args:
            call: given a server and the seconds it may take there; returns the answer or raises `ServerFault`. It is
                called again, elsewhere or there, only after it has failed.
            needs: adapter the server must hold.
            prefix: calls with the same number share a prompt's beginning (policy prefix).
            timeout_s: for all of it, waiting included. While other servers are left, one attempt gets half of what
                is left, or four times what calls take there, so that a hanging server leaves time for another.
            attempts: most calls of `call`, those after loading an adapter not counted.
            on_fault: told of every failed attempt, the last included: server, fault, seconds it took.
            weight: size of the call, in any unit (tokens to generate); speeds are seconds per weight.
            patient: whether to wait for servers that are out to come back within the time.

        Returns:
            The answer, and the seconds this call stood in line.

        Raises:
            ServerFault: REJECTED at once; any other once the attempts or the time are used up, or no server could
                do better.
            NoServers: no server can serve it in time.
            ValueError: a weight that is not above 0.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} must be above 0: the size of the call")
        self._enter()
        self._tickets += 1
        ticket = Ticket(self._tickets, needs, prefix, weight, self._clock() + timeout_s, patient)
        with self._residency.using(needs):
            return await self._run(ticket, call, attempts, on_fault)

    async def _run(
        self,
        ticket: Ticket,
        call: Callable[[ServerSpec, float], Awaitable[T]],
        attempts: int,
        on_fault: Callable[[ServerSpec, ServerFault, float], None] | None,
    ) -> tuple[T, float]:
        queued = 0.0
        last: ServerFault | None = None
        for attempt in range(max(1, attempts)):
            entered = self._clock()
            try:
                member = await self._places.take(ticket)
            except NoServers as error:
                if last is None:
                    raise
                raise NoServers(f"{error}; the last fault was: {last}") from last
            sent = self._clock()
            queued += sent - entered
            # the last one may take all the time there is
            share = attempt + 1 < attempts
            try:
                return await self._attempt(member, ticket, call, share, on_fault), queued
            except ServerFault as fault:
                last = fault
                if on_fault is not None:
                    on_fault(member.spec, fault, self._clock() - sent)
                if not self._lessons.failed(member, ticket, fault, sent):
                    raise
            await self._back_off(ticket, attempt)
        assert last is not None
        raise last

    async def _attempt(
        self,
        member: Member,
        ticket: Ticket,
        call: Callable[[ServerSpec, float], Awaitable[T]],
        share: bool,
        on_fault: Callable[[ServerSpec, ServerFault, float], None] | None,
    ) -> T:
        """One try at `member`, whose place it holds and gives back; a missing adapter is loaded on the way."""
        needs = ticket.needs
        try:
            if needs is not None and member.asked and needs not in member.held and self._residency.loader is not None:
                await self._load(member, ticket)
            loads = 0 if needs is None else self._residency.loads(member, needs)
            sent = self._clock()
            try:
                return await self._ask(member, ticket, call, share)
            except ServerFault as fault:
                if fault.kind is not FaultKind.MISSING or needs is None or self._residency.loader is None:
                    raise
                if on_fault is not None:
                    on_fault(member.spec, fault, self._clock() - sent)
            if self._residency.loads(member, needs) == loads:
                self._residency.lost(member, needs)
                await self._load(member, ticket)
            return await self._ask(member, ticket, call, share)
        finally:
            self._places.give_back(member)

    async def _load(self, member: Member, ticket: Ticket) -> None:
        assert ticket.needs is not None
        try:
            async with asyncio.timeout(max(0.0, ticket.deadline - self._clock())):
                await self._residency.load(member, ticket.needs)
        except TimeoutError as error:
            raise ServerFault(FaultKind.TIMEOUT, member.name, f"loading {ticket.needs!r} took too long") from error

    async def _ask(
        self, member: Member, ticket: Ticket, call: Callable[[ServerSpec, float], Awaitable[T]], share: bool
    ) -> T:
        sent = self._clock()
        seconds = max(0.0, ticket.deadline - sent)
        if share and len(self._members) > 1 and any(m is not member for m in self._places.able(ticket)):
            usual = ticket.weight * (member.latency.mean or 0.0)
            seconds = min(seconds, max(seconds / 2, 4 * usual))
        measured = member.limit.sent(member.in_flight)
        alarm = asyncio.timeout(seconds)
        try:
            async with alarm:
                member.alarms.add(alarm)
                answer = await call(member.spec, seconds)
        except BaseException as error:
            member.limit.dropped(measured)
            if not isinstance(error, TimeoutError):
                raise
            if alarm.expired() and self._clock() < sent + seconds:
                raise ServerFault(FaultKind.CONNECTION, member.name, "it stopped answering; call given up") from error
            raise ServerFault(FaultKind.TIMEOUT, member.name, f"no answer within {seconds:.3g} s") from error
        finally:
            member.alarms.discard(alarm)
        took = self._clock() - sent
        self._lessons.answered(member)
        member.latency.add(took, ticket.weight)
        member.limit.done(measured, took, ticket.weight)
        return answer

    async def _back_off(self, ticket: Ticket, attempt: int) -> None:
        """When every server that could serve failed this call, wait a little and allow all of them again."""
        able = [m for m in self._places.present() if m.serves(self._clock()) and m.name not in ticket.never]
        if not able or not ticket.avoid.issuperset(m.name for m in able):
            return
        ticket.avoid.clear()
        pause = min(FIRST_BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S) * self._rng.uniform(0.5, 1.5)
        await asyncio.sleep(max(0.0, min(pause, ticket.deadline - self._clock())))

    # -- whether anything can serve -------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether any server may take a call now, or after a pause it asked for."""
        return any(m.breaker.state is not BreakerState.OPEN for m in self._places.present())

    @property
    def ready(self) -> bool:
        """Whether any server takes calls now: neither out nor in a pause it asked for."""
        now = self._clock()
        return any(m.serves(now) for m in self._places.present())

    # -- adapters -------------------------------------------------------------------------------------------------

    @property
    def loader(self) -> Loader | None:
        """What loads a missing adapter on a server."""
        return self._residency.loader

    @loader.setter
    def loader(self, loader: Loader | None) -> None:
        self._residency.loader = loader

    def holds(self, server_name: str, adapter: str) -> bool:
        """Whether that server is known to hold `adapter`."""
        return adapter in self._member(server_name).held

    def mark(self, server_name: str, adapter: str, held: bool) -> None:
        """Say whether that server holds `adapter`; calls that need it go to those that do."""
        self._residency.mark(self._member(server_name), adapter, held)
        self._places.give_out()

    def uses(self, adapter: str) -> int:
        """Calls that need `adapter`, waiting or under way."""
        return self._residency.uses(adapter)

    async def unused(self, adapter: str) -> None:
        """Wait until no call needs `adapter`."""
        await self._residency.unused(adapter)

    # -- servers --------------------------------------------------------------------------------------------------

    def add(self, server: ServerSpec) -> None:
        """Take a server in; a started pool looks at it at once, and loads there what is wanted. One that is leaving
        stays. Raises `ConfigError` when there is another of that name."""
        known = self._members.get(server.name)
        if known is not None and not (known.draining and known.spec == server):
            raise ConfigError(f"server {server.name} is in the pool already; name every server once")
        if known is not None:
            known.draining = False
        else:
            self._members[server.name] = Member(server, Limit(self._max_in_flight))
        if self._started:
            self._watch.soon(self._members[server.name])
            self._places.changed()

    def remove(self, server_name: str) -> None:
        """Give that server no more calls; those under way there finish, then it is forgotten."""
        member = self._member(server_name)
        member.draining = True
        if not member.in_flight:
            del self._members[server_name]
        self._places.changed()

    def retire(self, server_name: str, why: str) -> None:
        """Give that server no more calls until `restore`; it stays listed, with the reason."""
        self._member(server_name).retired = why
        self._places.changed()

    def restore(self, server_name: str) -> None:
        """Take a retired server back."""
        member = self._member(server_name)
        member.retired = None
        if self._started:
            self._watch.soon(member)
        self._places.changed()

    def servers(self) -> tuple[ServerSpec, ...]:
        """Every server that is not leaving, healthy or not."""
        return tuple(m.spec for m in self._members.values() if not m.draining)

    def healthy(self) -> tuple[ServerSpec, ...]:
        """Servers whose calls go through."""
        return tuple(m.spec for m in self._members.values() if m.closed)

    def within_reach(self) -> tuple[ServerSpec, ...]:
        """The healthy ones, and those that came back and have yet to answer a call."""
        return tuple(m.spec for m in self._places.present() if m.breaker.state is not BreakerState.OPEN)

    def states(self) -> tuple[ServerState, ...]:
        """A snapshot of every server."""
        return tuple(m.state() for m in self._members.values())

    def _member(self, server_name: str) -> Member:
        try:
            return self._members[server_name]
        except KeyError:
            raise ConfigError(f"no server {server_name!r} in the pool{nearest(server_name, self._members)}") from None

    async def start(self) -> None:
        """Look at every server once, then keep looking. Without it only calls tell how servers are."""
        self._enter()
        if self._started or self._closed:
            return
        self._started = True
        await self._watch.look_at_all()
        self._watch.keep_looking(self._poll_every_s)

    async def close(self) -> None:
        """Stop looking; calls that wait end with `NoServers`, those under way finish."""
        self._closed = True
        self._residency.close()
        await self._watch.close()
        self._places.close()

    def _changed(self) -> None:
        self._places.changed()
        if self._roll is not None:
            self._roll.look()

    def _enter(self) -> None:
        """Be at home in the running event loop; what went on in an earlier one ended with it."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise EngineError("a ServerPool serves one event loop at a time; make one pool for each")
        self._loop = loop
        self._places.enter()
        self._residency.enter()
        self._watch.enter(loop)
