"""Whether servers are well: probes after failed calls, looks at regular times, and the way back.

    a call failed --probe--> unwell: breaker opens --pause--> look again --well--> load what is wanted --> trial call
    now and then --look--> unwell and idle, or unwell twice and silent between: breaker opens, its calls are given up

A sleeping or paused server answers nothing but keeps its connections and may call itself healthy, so what counts is
what `ServerControl.health` says, and whether any call was answered since.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from coterie.inference.breaker import BreakerState
from coterie.inference.residency import Residency
from coterie.inference.routing import Member
from coterie.inference.wire import FaultKind, ServerControl, ServerFault


class Watch:
    """Of all members of a pool.

    Args:
        members: the pool's own mapping, by name.
        changed: called whenever a server may have become usable or unusable.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        control: ServerControl,
        residency: Residency,
        clock: Callable[[], float],
        rng: random.Random,
        changed: Callable[[], None],
    ) -> None:
        self._members = members
        self._control = control
        self._residency = residency
        self._clock = clock
        self._rng = rng
        self._changed = changed
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._probing: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._every_s: float | None = None
        self._closed = False

    # -- what calls tell ------------------------------------------------------------------------------------------

    def failed(self, member: Member) -> None:
        """A call failed in a way that says it all (refused, reset)."""
        if member.breaker.failed(self._clock()):
            self._opened(member)

    def suspect(self, member: Member) -> None:
        """A call failed in a way that may be the call's fault: find out. One probe at a time."""
        if member.breaker.state is BreakerState.HALF_OPEN:
            self.failed(member)
        elif member.name not in self._probing:
            self._probing.add(member.name)
            self._spawn(self._probe(member))

    async def _probe(self, member: Member) -> None:
        try:
            await self._control.health(member.spec)
        except ServerFault as fault:
            member.why = fault.reason
            if member.breaker.state is not BreakerState.OPEN:
                member.breaker.trip(self._clock())
                self._opened(member)
        else:
            self.failed(member)
        finally:
            self._probing.discard(member.name)

    # -- the way back ---------------------------------------------------------------------------------------------

    def _opened(self, member: Member) -> None:
        member.trial = False
        self._come_back(member)
        self._changed()

    def _come_back(self, member: Member) -> None:
        self._later(member.breaker.until - self._clock(), lambda: self._spawn(self._return(member)))

    async def _return(self, member: Member) -> None:
        def gone() -> bool:
            return member.breaker.state is not BreakerState.OPEN or self._members.get(member.name) is not member

        if gone():
            return
        try:
            await self._control.health(member.spec)
            self._residency.forget(member)
            await self._residency.refresh(member)
        except ServerFault:
            if not gone():
                member.breaker.trip(self._clock())
                self._opened(member)
            return
        if not gone():
            member.breaker.half_open()
            self._changed()

    # -- regular looks --------------------------------------------------------------------------------------------

    async def look_at_all(self) -> None:
        """Look at every server that is not known to be out."""
        await asyncio.gather(*(self.look(m) for m in list(self._members.values()) if m.serves(self._clock())))

    async def look(self, member: Member) -> None:
        """Health, load and served names of one server."""
        try:
            await self._control.health(member.spec)
        except ServerFault as fault:
            self._unwell(member, fault)
            return
        member.unwell_since = None
        try:
            member.looked_at(await self._control.metrics(member.spec))
            await self._residency.refresh(member)
        except ServerFault as fault:
            if fault.kind is FaultKind.UNAUTHORIZED:
                member.retired = str(fault)
        self._changed()

    def _unwell(self, member: Member, fault: ServerFault) -> None:
        if fault.kind is FaultKind.UNAUTHORIZED:
            member.retired = str(fault)
            self._changed()
            return
        member.why = fault.reason
        if member.breaker.state is BreakerState.OPEN:
            return
        first, now = member.unwell_since, self._clock()
        if first is None:
            member.unwell_since = now
        # a busy server may be slow to say that it is well; its answers say so too
        if member.in_flight and (first is None or member.last_answer >= first):
            return
        member.breaker.trip(now)
        for alarm in list(member.alarms):
            if not alarm.expired():
                alarm.reschedule(asyncio.get_running_loop().time())
        self._opened(member)

    def keep_looking(self, every_s: float) -> None:
        """Look at all servers about every `every_s` seconds, until closed."""
        self._every_s = every_s

        async def go() -> None:
            while True:
                await asyncio.sleep(every_s * self._rng.uniform(0.9, 1.1))
                await self.look_at_all()

        self._spawn(go())

    def soon(self, member: Member) -> None:
        """Look at `member` now, beside whatever else goes on."""
        self._spawn(self.look(member))

    # -- tasks and timers -----------------------------------------------------------------------------------------

    def enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """A new event loop: take up there what was going on in the old one."""
        self._loop = loop
        self._tasks.clear()
        self._timers.clear()
        self._probing.clear()
        for member in self._members.values():
            member.alarms.clear()
            if member.breaker.state is BreakerState.OPEN:
                self._come_back(member)
            elif member.paused_until > self._clock():
                self.wake_at(member.paused_until)
        if self._every_s is not None:
            self.keep_looking(self._every_s)

    def wake_at(self, when: float) -> None:
        """Say at `when` that something changed."""
        self._later(when - self._clock(), self._changed)

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        if self._closed or self._loop is None:
            return

        def fire() -> None:
            self._timers.discard(handle)
            act()

        handle = self._loop.call_later(max(0.0, delay_s), fire)
        self._timers.add(handle)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed or self._loop is None:
            work.close()
            return
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # nobody awaits these tasks: what breaks them must be seen somewhere
            context = {"message": "looking after servers failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    async def close(self) -> None:
        """Stop all of it."""
        self._closed = True
        for handle in self._timers:
            handle.cancel()
        self._timers.clear()
        tasks = [task for task in self._tasks if task.get_loop() is asyncio.get_running_loop()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
