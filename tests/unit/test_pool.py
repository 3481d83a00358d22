"""The server pool, on simulated servers in virtual time: who is called when, and what becomes of faults."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from coterie.inference.pool import NoServers, ServerPool, ServerState
from coterie.inference.routing import POLICIES
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec
from tests.support.virtual import SimFleet, SimServer, now, run

Call = Callable[[ServerSpec, float], Awaitable[str]]


def fleet_of(*names: str, slots: int = 8) -> SimFleet:
    return SimFleet(*(SimServer(name, slots=slots) for name in names))


def pool_of(fleet: SimFleet, **settings: object) -> ServerPool:
    return ServerPool(fleet.specs(), fleet, clock=now, **settings)  # type: ignore[arg-type]


def calling(fleet: SimFleet, name: str = "x", seconds: float = 1.0, adapter: str | None = None) -> Call:
    async def call(server: ServerSpec, remaining_s: float) -> str:
        return await fleet.servers[server.name].serve(name, seconds, adapter)

    return call


def state(pool: ServerPool, name: str) -> ServerState:
    return next(s for s in pool.states() if s.name == f"{name}:80")


class Faults:
    """What `on_fault` was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, FaultKind]] = []

    def __call__(self, server: ServerSpec, fault: ServerFault, seconds: float) -> None:
        self.seen.append((server.name, fault.kind))


# -- places --------------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_the_time_it_waited_here() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        first, second = await asyncio.gather(pool.run(calling(fleet, "1")), pool.run(calling(fleet, "2")))
        assert (first, second) == (("1", 0.0), ("2", 1.0))
        await pool.close()

    run(main())


def test_first_come_first_served() -> None:
    async def main() -> None:
        fleet = fleet_of("a", slots=3)
        pool = pool_of(fleet, max_in_flight=3)
        await asyncio.gather(*(pool.run(calling(fleet, str(i))) for i in range(20)))
        assert fleet.servers["a:80"].asked == [str(i) for i in range(20)]

    run(main())


@pytest.mark.parametrize("policy", POLICIES)
def test_no_server_is_given_more_than_the_cap(policy: str) -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b", slots=2)
        pool = pool_of(fleet, policy=policy, max_in_flight=5)
        await asyncio.gather(*(pool.run(calling(fleet, str(i)), prefix=i % 3) for i in range(60)))
        assert max(s.peak for s in fleet.servers.values()) <= 5
        answered = [name for s in fleet.servers.values() for name in s.answered]
        assert sorted(answered, key=int) == [str(i) for i in range(60)]

    run(main())


def test_a_cancelled_waiter_takes_no_place() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        running, waiting, last = (asyncio.create_task(pool.run(calling(fleet, n))) for n in "123")
        await asyncio.sleep(0.5)
        waiting.cancel()
        assert await running == ("1", 0.0)
        assert await last == ("3", 1.0)
        assert waiting.cancelled()
        assert state(pool, "a").in_flight == 0

    run(main())


def test_cancelled_in_the_moment_it_got_its_place_a_waiter_passes_it_on() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)

        async def hold() -> None:
            await pool.run(calling(fleet, "1", 0.1))
            # the place was given to `waiting` on the way here, and its task has not run since
            waiting.cancel()

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(pool.run(calling(fleet, "2")))
        behind = asyncio.create_task(pool.run(calling(fleet, "3")))
        await holder
        results = await asyncio.gather(waiting, behind, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1] == ("3", pytest.approx(0.1))
        assert state(pool, "a").in_flight == 0

    run(main())


def test_a_call_cancelled_under_way_gives_its_place_back() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        running = asyncio.create_task(pool.run(calling(fleet, "1", 100.0)))
        await asyncio.sleep(1)
        running.cancel()
        assert (await pool.run(calling(fleet, "2")))[0] == "2"
        assert fleet.servers["a:80"].answered == ["2"]

    run(main())


def test_an_error_of_the_callers_own_gives_the_place_back_and_is_not_tried_again() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        calls = 0

        async def broken(server: ServerSpec, remaining_s: float) -> str:
            nonlocal calls
            calls += 1
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await pool.run(broken)
        assert (calls, state(pool, "a").in_flight) == (1, 0)

    run(main())


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FaultKind.CONNECTION, FaultKind.TIMEOUT, FaultKind.OVERLOADED, FaultKind.SERVER])
def test_a_failed_call_goes_to_another_server(kind: FaultKind) -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet)
        for server in fleet.servers.values():
            server.faults.append(server.fault(kind))
        faults = Faults()
        first, second = await asyncio.gather(*(pool.run(calling(fleet, n), on_fault=faults) for n in "12"))
        assert (first[0], second[0]) == ("1", "2")
        assert sorted(faults.seen) == [("a:80", kind), ("b:80", kind)]
        await pool.close()

    run(main())


def test_the_other_server_is_preferred_even_when_it_is_busier() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, policy="least_loaded")
        fleet.servers["a:80"].faults.append(fleet.servers["a:80"].fault(FaultKind.CONNECTION))
        fleet.servers["b:80"].faults.append(fleet.servers["b:80"].fault(FaultKind.CONNECTION))
        faults = Faults()
        assert (await pool.run(calling(fleet), on_fault=faults))[0] == "x"
        assert {name for name, _ in faults.seen} == {"a:80", "b:80"}

    run(main())


def test_what_is_rejected_is_raised_at_once_in_the_servers_words() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet)
        for server in fleet.servers.values():
            server.faults.append(server.fault(FaultKind.REJECTED, "prompt is too long", status=400))
        faults = Faults()
        with pytest.raises(ServerFault, match="prompt is too long"):
            await pool.run(calling(fleet), on_fault=faults)
        assert len(faults.seen) == 1
        assert all(s.failures == 0 and s.healthy for s in pool.states())

    run(main())


def test_a_server_that_refuses_the_key_leaves_the_pool() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, policy="round_robin")
        bad = fleet.servers["a:80"]
        bad.faults.extend(bad.fault(FaultKind.UNAUTHORIZED, "set api_key_env", status=401) for _ in range(9))
        for i in range(4):
            assert (await pool.run(calling(fleet, str(i))))[0] == str(i)
        assert "set api_key_env" in state(pool, "a").retired_because
        assert [s.name for s in pool.healthy()] == ["b:80"]
        assert len(bad.faults) == 8

    run(main())


def test_retry_after_is_kept_to() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        server = fleet.servers["a:80"]
        server.faults.append(server.fault(FaultKind.OVERLOADED, status=503, retry_after_s=7.0))
        pool = pool_of(fleet)
        answer, queued = await pool.run(calling(fleet))
        assert (answer, queued, now()) == ("x", 7.0, 8.0)
        assert pool.available

    run(main())


def test_a_pause_past_the_deadline_is_not_waited_for() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        server = fleet.servers["a:80"]
        server.faults.append(server.fault(FaultKind.OVERLOADED, status=503, retry_after_s=600.0))
        pool = pool_of(fleet)
        with pytest.raises(NoServers, match=r"asked for a pause of 600.0 s.*503"):
            await pool.run(calling(fleet), timeout_s=60.0)
        assert now() == 0.0

    run(main())


def test_the_last_fault_is_raised_when_the_attempts_are_used_up() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        for server in fleet.servers.values():
            server.faults.extend(server.fault(FaultKind.SERVER, "kernel panic", status=500) for _ in range(2))
        faults = Faults()
        pool = pool_of(fleet)
        with pytest.raises(ServerFault, match="kernel panic"):
            await pool.run(calling(fleet), attempts=4, on_fault=faults)
        assert len(faults.seen) == 4
        await pool.close()

    run(main())


def test_after_a_500_the_server_is_probed_and_left_when_it_is_unwell() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        sick, well = fleet.servers["a:80"], fleet.servers["b:80"]
        sick.faults.append(sick.fault(FaultKind.SERVER, status=500))
        sick.sick = sick.fault(FaultKind.SERVER, "engine is dead", status=503)
        pool = pool_of(fleet, policy="round_robin")
        for i in range(4):
            await pool.run(calling(fleet, str(i)))
        assert fleet.asked.count(("health", "a:80")) >= 1
        assert state(pool, "a").breaker == "open"
        assert well.answered == ["0", "1", "2", "3"]
        await pool.close()

    run(main())


def test_after_a_500_a_server_that_is_well_is_used_on() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        server = fleet.servers["a:80"]
        server.faults.extend(server.fault(FaultKind.SERVER, status=500) for _ in range(2))
        pool = pool_of(fleet)
        assert (await pool.run(calling(fleet)))[0] == "x"
        assert fleet.asked.count(("health", "a:80")) == 2
        assert state(pool, "a").breaker == "closed"

    run(main())


def test_a_hanging_server_leaves_time_for_another() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        fleet.servers["a:80"].hung = True
        pool = pool_of(fleet, policy="round_robin")
        faults = Faults()
        answers = await asyncio.gather(*(pool.run(calling(fleet, n), timeout_s=60.0, on_fault=faults) for n in "1234"))
        assert [a for a, _ in answers] == ["1", "2", "3", "4"]
        assert set(faults.seen) == {("a:80", FaultKind.TIMEOUT)}
        assert now() <= 32.0
        await pool.close()

    run(main())


def test_the_only_server_may_take_all_the_time_there_is() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet)
        assert (await pool.run(calling(fleet, seconds=59.0), timeout_s=60.0))[0] == "x"
        with pytest.raises(ServerFault, match="no answer within 60 s"):
            await pool.run(calling(fleet, seconds=61.0), timeout_s=60.0)
        await pool.close()

    run(main())
