"""Whatever servers do, and whoever is cancelled: every call of a pool ends once, and no place is lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.errors import EngineError
from coterie.inference.pool import ServerPool
from coterie.inference.routing import POLICIES
from coterie.inference.wire import FaultKind, ServerSpec
from tests.support.virtual import SimFleet, SimServer, now, run


@dataclass(frozen=True)
class Event:
    """Something that happens to the `server`-th server at `at` seconds."""

    at: float
    server: int
    what: str


@dataclass(frozen=True)
class Caller:
    """A call, and when, if at all, it is cancelled."""

    at: float
    seconds: float
    adapter: str | None
    cancelled_after: float | None


WHAT = ("kill", "revive", "hang", "wake", "503", "500", "401", "reset", "evict", "retire", "restore", "remove", "add")
times = st.floats(0.0, 20.0, allow_nan=False)
events = st.lists(st.builds(Event, times, st.integers(0, 2), st.sampled_from(WHAT)), max_size=12)
callers = st.lists(
    st.builds(
        Caller,
        at=times,
        seconds=st.floats(0.01, 3.0),
        adapter=st.sampled_from([None, "m-v1"]),
        cancelled_after=st.none() | st.floats(0.0, 5.0),
    ),
    min_size=1,
    max_size=25,
)


class World:
    """Three servers, a pool, and what is known of every call."""

    def __init__(self, policy: str, cap: int) -> None:
        self.servers = [SimServer(f"s{i}", slots=2) for i in range(3)]
        self.fleet = SimFleet(*self.servers)
        self.pool = ServerPool(
            self.fleet.specs(),
            self.fleet,
            policy=policy,
            max_in_flight=cap,
            poll_every_s=3.0,
            clock=now,
            loader=self.load,
        )
        self.under_way: dict[int, int] = {}
        self.cap = cap

    async def load(self, server: ServerSpec, adapter: str) -> None:
        await self.fleet.load_adapter(server, adapter, "/path")

    async def happen(self, event: Event) -> None:
        await asyncio.sleep(event.at)
        server = self.servers[event.server]
        known = {state.name for state in self.pool.states()}
        match event.what:
            case "kill":
                server.kill()
            case "revive":
                server.revive()
            case "hang":
                server.hung = True
            case "wake":
                server.hung = False
                server._start()
            case "503":
                server.faults.append(server.fault(FaultKind.OVERLOADED, retry_after_s=1.0))
            case "500":
                server.faults.append(server.fault(FaultKind.SERVER))
            case "401":
                server.faults.append(server.fault(FaultKind.UNAUTHORIZED))
            case "reset":
                server.faults.append(server.fault(FaultKind.CONNECTION))
            case "evict":
                server.adapters.clear()
            case "retire" if server.name in known:
                self.pool.retire(server.name, "on command")
            case "restore" if server.name in known:
                self.pool.restore(server.name)
            case "remove" if server.name in known:
                self.pool.remove(server.name)
            case "add" if server.name not in known:
                self.pool.add(server.spec)

    async def call(self, number: int, caller: Caller) -> str:
        """Returns how it ended."""
        await asyncio.sleep(caller.at)
        answers = 0

        async def ask(server: ServerSpec, remaining_s: float) -> str:
            nonlocal answers
            assert answers == 0, "asked again after it was answered"
            assert self.under_way.get(number, 0) == 0, "two attempts at once"
            here = self.servers[int(server.name[1])]
            self.under_way[number] = 1
            try:
                answer = await here.serve(str(number), caller.seconds, caller.adapter)
                answers += 1
                return answer
            finally:
                self.under_way[number] = 0

        run_it = asyncio.ensure_future(self.pool.run(ask, needs=caller.adapter, timeout_s=30.0, prefix=number % 4))
        if caller.cancelled_after is not None:
            asyncio.get_running_loop().call_later(caller.cancelled_after, run_it.cancel)
        try:
            answer, queued = await run_it
        except asyncio.CancelledError:
            return "cancelled"
        except EngineError:
            assert answers == 0, "an answer that arrived was lost"
            return "failed"
        assert (answer, answers) == (str(number), 1)
        assert queued >= 0.0
        return "answered"


@settings(max_examples=150)
@example(  # a trial call while one from before the pause still holds the only place
    events=[Event(0.0, 0, "kill"), Event(0.0, 1, "kill"), Event(0.0, 2, "hang"), Event(0.0, 2, "500")],
    callers=[Caller(at, 1.0, None, None) for at in (0.0, 0.0, 2.0, 2.0)],
    policy="power_of_two",
    cap=1,
)
@given(events=events, callers=callers, policy=st.sampled_from(POLICIES), cap=st.integers(1, 4))
def test_every_call_ends_once_and_every_place_comes_back(
    events: list[Event], callers: list[Caller], policy: str, cap: int
) -> None:
    async def main() -> None:
        world = World(policy, cap)
        await world.pool.start()
        async with asyncio.timeout(200.0):
            outcomes = await asyncio.gather(
                *(world.call(number, caller) for number, caller in enumerate(callers)),
                *(world.happen(event) for event in events),
            )
        assert set(outcomes[: len(callers)]) <= {"answered", "cancelled", "failed"}
        assert all(state.in_flight == 0 for state in world.pool.states())
        assert world.pool.uses("m-v1") == 0
        assert all(server.peak <= cap for server in world.servers)
        await world.pool.close()
        # what the pool was looking after is gone as well
        assert len(asyncio.all_tasks()) == 1

    run(main())


@settings(max_examples=60)
@given(
    faults=st.lists(st.sampled_from(["503", "500", "reset", "evict"]), max_size=5),
    count=st.integers(1, 30),
    cap=st.integers(1, 5),
)
def test_faults_that_pass_lose_no_call(faults: list[str], count: int, cap: int) -> None:
    """As long as one server lives, everything is answered, by whatever policy."""

    async def main() -> None:
        for policy in POLICIES:
            world = World(policy, cap)
            for index, what in enumerate(faults):
                await world.happen(Event(0.0, index % 3, what))
            ended = await asyncio.gather(
                *(world.call(number, Caller(0.0, 0.5, "m-v1", None)) for number in range(count))
            )
            assert ended == ["answered"] * count
            answered = [name for server in world.servers for name in server.answered]
            assert sorted(answered, key=int) == [str(number) for number in range(count)]
            await world.pool.close()

    run(main())
