"""Which server holds which adapter, and loading one where it is missing.

    unknown  --the server is asked, or a load succeeds--> held --404, unloaded, restarted--> not held --load--> held

`wanted` are the names that somebody holds on purpose: what a server that comes back must hold before it takes calls.
One load per (server, adapter) is under way at a time; all who need it wait for the same one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

from coterie.errors import EngineError
from coterie.inference.routing import Member
from coterie.inference.wire import FaultKind, ServerControl, ServerFault, ServerSpec

Loader = Callable[[ServerSpec, str], Awaitable[None]]

RELOAD_AFTER_S = 10.0
"""A load that failed is not tried again for this long; those who need it meanwhile get the same fault."""


class Residency:
    """Of all members of a pool; `members` is the pool's own mapping, by name."""

    def __init__(
        self,
        members: Mapping[str, Member],
        control: ServerControl,
        clock: Callable[[], float],
        loader: Loader | None,
    ) -> None:
        self._members = members
        self._control = control
        self._clock = clock
        self.loader = loader
        self.wanted: set[str] = set()
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failed: dict[tuple[str, str], tuple[float, ServerFault]] = {}
        self._changes: dict[str, int] = {}
        """Per server; shows that what it said of itself is older than what is known."""
        self._loads: dict[tuple[str, str], int] = {}
        self._uses: dict[str, int] = {}
        self._unused: dict[str, list[asyncio.Future[None]]] = {}

    def mark(self, member: Member, adapter: str, held: bool) -> None:
        """Say whether `member` holds `adapter`. Not held by anybody any more: nobody wants it."""
        self._changes[member.name] = self._changes.get(member.name, 0) + 1
        self._failed.pop((member.name, adapter), None)
        if held:
            member.held.add(adapter)
            self.wanted.add(adapter)
            return
        member.held.discard(adapter)
        if not any(adapter in other.held for other in self._members.values()):
            self.wanted.discard(adapter)

    def lost(self, member: Member, adapter: str) -> None:
        """`member` says it does not know `adapter`, which stays wanted."""
        member.held.discard(adapter)

    def forget(self, member: Member) -> None:
        """`member` may have been restarted: only what it says from now on counts."""
        member.asked = False
        member.held.clear()

    def fit(self, members: list[Member], adapter: str | None) -> list[Member]:
        """Those of `members` to ask: the holders; else those that may hold it; else all, to load it or to say no."""
        if adapter is None:
            return members
        holders = [m for m in members if adapter in m.held]
        return holders or [m for m in members if not m.asked] or members

    def loads(self, member: Member, adapter: str) -> int:
        """How often `adapter` was loaded there; who asked before the last load may simply ask again."""
        return self._loads.get((member.name, adapter), 0)

    async def load(self, member: Member, adapter: str) -> None:
        """Load `adapter` there, or wait for the load that is under way. Cancelling a waiter does not stop the load.

        Raises:
            ServerFault: it failed, now or a moment ago.
        """
        key = (member.name, adapter)
        task = self._loading.get(key)
        if task is None:
            failed = self._failed.get(key)
            if failed is not None and self._clock() < failed[0] + RELOAD_AFTER_S:
                raise failed[1]
            task = asyncio.get_running_loop().create_task(self._load(member, adapter))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        await asyncio.shield(task)

    async def _load(self, member: Member, adapter: str) -> None:
        if self.loader is None:
            raise ServerFault(FaultKind.MISSING, member.name, f"{adapter!r} is not loaded there, and nothing loads it")
        try:
            await self.loader(member.spec, adapter)
        except EngineError as error:
            fault = ServerFault(FaultKind.MISSING, member.name, f"loading {adapter!r} failed: {error}")
            self._failed[member.name, adapter] = (self._clock(), fault)
            raise fault from error
        self.mark(member, adapter, True)
        key = (member.name, adapter)
        self._loads[key] = self._loads.get(key, 0) + 1

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._loading.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen by those who wait; when all of them were cancelled nobody else would look

    async def refresh(self, member: Member) -> None:
        """Ask `member` what it serves, and load what is wanted and not there. Loads that fail are left for later.

        Raises:
            ServerFault: it does not say.
        """
        before = self._changes.get(member.name, 0)
        names = await self._control.models(member.spec)
        if self._changes.get(member.name, 0) != before:
            return
        member.held = set(names)
        member.asked = True
        if self.loader is None:
            return
        lacking = sorted(self.wanted - member.held)
        for ended in await asyncio.gather(*(self.load(member, name) for name in lacking), return_exceptions=True):
            if ended is not None and not isinstance(ended, ServerFault):
                raise ended

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """While a call needs `adapter`, waiting or under way."""
        if adapter is None:
            yield
            return
        self._uses[adapter] = self._uses.get(adapter, 0) + 1
        try:
            yield
        finally:
            self._uses[adapter] -= 1
            if not self._uses[adapter]:
                del self._uses[adapter]
                for waiter in self._unused.pop(adapter, []):
                    if not waiter.done():
                        waiter.set_result(None)

    def uses(self, adapter: str) -> int:
        """Calls that need `adapter`."""
        return self._uses.get(adapter, 0)

    async def unused(self, adapter: str) -> None:
        """Wait until no call needs `adapter`."""
        while self.uses(adapter):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unused.setdefault(adapter, []).append(waiter)
            await waiter

    def enter(self) -> None:
        """A new event loop: the loads of the old one ended with it."""
        self._loading.clear()
        self._unused.clear()

    def close(self) -> None:
        """Stop every load under way."""
        for task in self._loading.values():
            task.cancel()
