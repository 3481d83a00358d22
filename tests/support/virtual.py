"""Virtual time: asyncio code that waits for hours runs in milliseconds, exactly and always in the same order.

`VirtualLoop` is an ordinary event loop whose clock jumps to the next timer whenever nothing is ready to run. `run`
runs a coroutine on one. `SimServer` is a server with a number of slots and a queue, on that clock: a discrete-event
simulation of what the pool talks to, and a `ServerControl` of such servers is `SimFleet`.

`HastyLoop`, and `run_hasty`, are for real sockets between coroutines of one loop: it waits a little before it jumps.
Work costs no time there, however slow the machine, so a deadline passes only when nothing else is left to happen.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, server_spec

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            # no timer is left: only a thread can still wake the loop
            ready = super().select(5.0)
            if not ready:
                raise RuntimeError("nothing is left that could ever happen: the code under test waits for ever")
            return ready
        ready = super().select(0)
        if not ready:
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time costs nothing."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


GRACE_S = 0.05
"""Real seconds without news after which `HastyLoop` takes it that none is coming: what one coroutine sends, the kernel
hands to the other end within microseconds."""


class _HastySelector(selectors.DefaultSelector):
    """Advances the time by what it waited, or was to wait, and by nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jobs = 0
        """Calls under way in threads, for which it waits as long as they take."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        began = time.monotonic()
        if timeout is None:
            ready = super().select(60.0)
            if not ready:
                raise RuntimeError("nothing is left that could ever happen: the code under test waits for ever")
        elif timeout <= GRACE_S or self.jobs:
            ready = super().select(timeout)
        else:
            ready = super().select(GRACE_S)
            if not ready:
                self.now += timeout + 1e-9  # rounding could leave it just short of the timer
                return ready
        waited = time.monotonic() - began
        self.now += waited if timeout is None or ready else max(0.0, timeout)
        return ready


class HastyLoop(asyncio.SelectorEventLoop):
    """An event loop with real sockets and threads, whose long waits are short."""

    def __init__(self) -> None:
        self._hasty = _HastySelector()
        super().__init__(self._hasty)

    def time(self) -> float:
        return self._hasty.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        self._hasty.jobs += 1
        future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._done)
        return future

    async def shutdown_default_executor(self, *arguments: Any) -> None:
        self._hasty.jobs += 1
        try:
            await super().shutdown_default_executor(*arguments)
        finally:
            self._hasty.jobs -= 1

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._hasty.jobs -= 1


def run_hasty(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` where long waits are short."""
    with asyncio.Runner(loop_factory=HastyLoop) as runner:
        return runner.run(main)


def now() -> float:
    """Virtual seconds; the clock to give to what is tested."""
    return asyncio.get_running_loop().time()


class SimServer:
    """`slots` calls at a time, the others queue; a call takes its own seconds times `slow`."""

    def __init__(self, name: str, *, slots: int = 8, slow: float = 1.0) -> None:
        self.spec = server_spec(f"http://{name}:80")
        self.slots = slots
        self.slow = slow
        self.up = True
        self.hung = False
        self.adapters: dict[str, str] = {}
        """Name -> path."""
        self.faults: deque[ServerFault] = deque()
        """Given to the next calls, one each, before they take any time."""
        self.sick: ServerFault | None = None
        """What control calls get."""
        self.load_faults: deque[ServerFault] = deque()
        self.load_s = 0.0
        self.answered: list[str] = []
        """Ids of the calls answered, in order."""
        self.asked: list[str] = []
        """Ids of the calls that reached it, in order."""
        self.loads = 0
        self.peak = 0
        """Most calls here at once."""
        self._queue: deque[tuple[asyncio.Future[None], float]] = deque()
        self._running: set[asyncio.Future[None]] = set()
        self._present = 0

    @property
    def name(self) -> str:
        return self.spec.name

    def fault(self, kind: FaultKind, message: str = "on command", **details: Any) -> ServerFault:
        return ServerFault(kind, self.name, message, **details)

    async def serve(self, call_id: str, seconds: float, adapter: str | None = None) -> str:
        """One call; returns `call_id`."""
        self._check()
        self.asked.append(call_id)
        if self.faults:
            raise self.faults.popleft()
        if adapter is not None and adapter not in self.adapters:
            raise self.fault(FaultKind.MISSING, f"no model {adapter}", status=404)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((place, seconds))
        self._present += 1
        self.peak = max(self.peak, self._present)
        self._start()
        try:
            await place
        finally:
            self._present -= 1
            if place in self._running:
                self._running.discard(place)
                self._start()
        self.answered.append(call_id)
        return call_id

    def metrics(self) -> dict[str, float]:
        """Its queue, under vLLM's names."""
        running = len(self._running)
        return {"vllm:num_requests_running": running, "vllm:num_requests_waiting": self._present - running}

    def kill(self) -> None:
        """Every call under way is cut off; later ones are refused. Adapters are forgotten."""
        self.up = False
        self.adapters.clear()
        for place in [*self._running, *(place for place, _ in self._queue)]:
            if not place.done():
                place.set_exception(self.fault(FaultKind.CONNECTION, "connection reset"))
        self._running.clear()
        self._queue.clear()

    def revive(self) -> None:
        self.up = True

    def _check(self) -> None:
        if not self.up:
            raise self.fault(FaultKind.CONNECTION, "connection refused")

    def _start(self) -> None:
        while self._queue and len(self._running) < self.slots and not self.hung:
            place, seconds = self._queue.popleft()
            if place.done():
                continue
            self._running.add(place)
            asyncio.get_running_loop().call_later(seconds * self.slow, self._finish, place)

    def _finish(self, place: asyncio.Future[None]) -> None:
        if self.hung:
            return
        self._running.discard(place)
        if not place.done():
            place.set_result(None)
        self._start()


class SimFleet:
    """`ServerControl` of simulated servers; counts what it is asked."""

    def __init__(self, *servers: SimServer) -> None:
        self.servers = {s.name: s for s in servers}
        self.asked: list[tuple[str, str]] = []
        self.gauges: dict[str, Mapping[str, float]] = {}

    def specs(self) -> list[ServerSpec]:
        return [s.spec for s in self.servers.values()]

    def _reach(self, server: ServerSpec, what: str) -> SimServer:
        self.asked.append((what, server.name))
        here = self.servers[server.name]
        if not here.up:
            raise here.fault(FaultKind.CONNECTION, "connection refused")
        if here.sick is not None:
            raise here.sick
        return here

    async def models(self, server: ServerSpec) -> tuple[str, ...]:
        return ("base", *self._reach(server, "models").adapters)

    async def load_adapter(self, server: ServerSpec, name: str, path: str) -> None:
        here = self._reach(server, "load")
        here.loads += 1
        if here.load_s:
            await asyncio.sleep(here.load_s)
        if here.load_faults:
            raise here.load_faults.popleft()
        here.adapters[name] = path

    async def unload_adapter(self, server: ServerSpec, name: str) -> None:
        self._reach(server, "unload").adapters.pop(name, None)

    async def health(self, server: ServerSpec) -> None:
        self._reach(server, "health")

    async def metrics(self, server: ServerSpec) -> Mapping[str, float]:
        return self.gauges.get(server.name) or self._reach(server, "metrics").metrics()
