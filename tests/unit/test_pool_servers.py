"""Servers of a pool that die, come back, sleep, are added and removed, and the adapters they hold; in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from coterie.errors import ConfigError, EngineError
from coterie.inference.pool import NoServers, ServerPool
from coterie.inference.roll import QUIET_S
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec
from tests.support.virtual import SimFleet, SimServer, now, run
from tests.unit.test_pool import Faults, calling, fleet_of, pool_of, state

# -- servers that die and come back --------------------------------------------------------------------------------


def test_a_dead_server_loses_no_call_and_is_used_again_when_it_is_back() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        dying = fleet.servers["a:80"]
        pool = pool_of(fleet)
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(100)]
        await asyncio.sleep(1.5)
        dying.kill()
        await asyncio.sleep(1.0)
        assert state(pool, "a").breaker == "open"
        before = len(dying.answered)
        dying.revive()
        answers = await asyncio.gather(*calls)
        assert [a for a, _ in answers] == [str(i) for i in range(100)]
        answered = dying.answered + fleet.servers["b:80"].answered
        assert sorted(answered, key=int) == [str(i) for i in range(100)]
        assert len(dying.answered) > before
        assert state(pool, "a").breaker == "closed"
        await pool.close()

    run(main())


async def _busy(pool: ServerPool, fleet: SimFleet, until: float) -> None:
    while now() < until:
        await pool.run(calling(fleet, seconds=0.5))


def test_who_goes_away_and_who_comes_back_is_told_once() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b", "c")
        told: list[str] = []
        pool = pool_of(fleet, on_change=told.append)
        await pool.start()
        await _busy(pool, fleet, 20.0)
        assert told == []
        fleet.servers["a:80"].kill()
        await _busy(pool, fleet, 100.0)
        assert told == ["server a:80 is away (connection: connection refused); answering: 2 of 3"]
        fleet.servers["a:80"].revive()
        await _busy(pool, fleet, 200.0)
        assert told[1:] == ["server a:80 is back; answering: 3 of 3"]
        fleet.servers["b:80"].kill()
        pool.remove("c:80")
        await _busy(pool, fleet, 300.0)
        assert told[2:] == ["server b:80 is away (connection: connection refused); answering: 1 of 2"]
        await pool.close()

    run(main())


def test_a_server_that_comes_and_goes_does_not_fill_the_screen() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        told: list[str] = []
        pool = pool_of(fleet, on_change=told.append)
        await pool.start()
        flapping = fleet.servers["a:80"]
        while now() < 600.0:
            flapping.kill()
            await _busy(pool, fleet, now() + 8.0)
            flapping.revive()
            await _busy(pool, fleet, now() + 8.0)
        assert 2 <= len(told) <= 600 / QUIET_S + 1
        flapping.revive()
        await _busy(pool, fleet, now() + 100.0)
        assert told[-1] == "server a:80 is back; answering: 2 of 2", "what is so in the end is always told"
        await pool.close()

    run(main())


def test_a_server_that_refuses_the_key_is_told_of_with_what_to_do() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        told: list[str] = []
        pool = pool_of(fleet, on_change=told.append)
        await pool.start()
        fleet.servers["a:80"].faults.append(fleet.servers["a:80"].fault(FaultKind.UNAUTHORIZED))
        await _busy(pool, fleet, 30.0)
        (line,) = told
        assert line.startswith("server a:80 is away (a:80: unauthorized")
        assert line.endswith("answering: 1 of 2")
        await pool.close()

    run(main())


def test_a_server_that_is_back_gets_one_call_as_a_trial() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        server = fleet.servers["a:80"]
        server.kill()
        pool = pool_of(fleet)
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(6)]
        await asyncio.sleep(0.5)
        server.revive()
        under_way = []
        for _ in range(40):
            await asyncio.sleep(0.1)
            under_way.append(state(pool, "a").in_flight)
        trial = under_way[: under_way.index(5)]
        assert set(trial) == {0, 1}, "one call alone, then all the others"
        assert len(await asyncio.gather(*calls)) == 6
        await pool.close()

    run(main())


def test_calls_that_hang_together_show_that_a_server_hangs() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        fleet.servers["a:80"].hung = True
        pool = pool_of(fleet, policy="round_robin")
        calls = [pool.run(calling(fleet, str(i)), timeout_s=40.0) for i in range(8)]
        assert [a for a, _ in await asyncio.gather(*calls)] == [str(i) for i in range(8)]
        assert state(pool, "a").breaker != "closed", "though it says that it is well"
        await pool.close()

    run(main())


def test_a_failed_trial_doubles_the_pause() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        server = fleet.servers["a:80"]
        pool = pool_of(fleet)
        # healthy to look at, but every call is cut off
        server.faults.extend(server.fault(FaultKind.CONNECTION) for _ in range(5))
        assert (await pool.run(calling(fleet)))[0] == "x"
        looks = [what for what, _ in fleet.asked]
        assert looks.count("health") == 3
        assert 1 + 2 + 4 <= now() <= 1 + 2 + 4 + 2

    run(main())


def test_without_patience_a_call_is_sent_away_when_every_server_is_out() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        for server in fleet.servers.values():
            server.kill()
        pool = pool_of(fleet)
        with pytest.raises(NoServers, match=r"out after \d failures.*connection refused"):
            await pool.run(calling(fleet), patient=False)
        assert not pool.available
        assert now() < 1.0
        with pytest.raises(NoServers):
            await pool.run(calling(fleet), patient=False)
        await pool.close()

    run(main())


def test_waiting_for_servers_that_are_out_ends_at_the_deadline() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        fleet.servers["a:80"].kill()
        pool = pool_of(fleet)
        with pytest.raises(NoServers):
            await pool.run(calling(fleet), timeout_s=20.0)
        assert 7.0 <= now() <= 20.0
        await pool.close()

    run(main())


# -- looks ---------------------------------------------------------------------------------------------------------


def test_starting_finds_out_who_is_there() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        fleet.servers["a:80"].kill()
        pool = pool_of(fleet)
        await pool.start()
        assert [s.name for s in pool.healthy()] == ["b:80"]
        faults = Faults()
        await asyncio.gather(*(pool.run(calling(fleet, str(i)), on_fault=faults) for i in range(10)))
        assert faults.seen == []
        await pool.close()

    run(main())


def test_a_look_finds_a_sleeping_server_and_frees_the_calls_that_hang_there() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        sleepy = fleet.servers["a:80"]
        pool = pool_of(fleet, poll_every_s=2.0, policy="round_robin")
        await pool.start()
        sleepy.hung = True
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)), timeout_s=1000.0)) for i in range(6)]
        await asyncio.sleep(0.1)
        assert state(pool, "a").in_flight == 3
        sleepy.sick = sleepy.fault(FaultKind.SERVER, "it is asleep")
        assert [a for a, _ in await asyncio.gather(*calls)] == [str(i) for i in range(6)]
        assert 2.0 < now() < 8.0, "two looks, then the other server"
        await pool.close()

    run(main())


def test_a_busy_server_that_answers_is_not_given_up_for_a_slow_health_check() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        busy = fleet.servers["a:80"]
        pool = pool_of(fleet, poll_every_s=2.0)
        await pool.start()
        busy.sick = busy.fault(FaultKind.TIMEOUT, "no answer within 10 s")
        faults = Faults()
        await asyncio.gather(*(pool.run(calling(fleet, str(i), 0.5), on_fault=faults) for i in range(200)))
        assert faults.seen == []
        await pool.close()

    run(main())


def test_what_servers_say_of_their_load_decides_between_equals() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        fleet.gauges["a:80"] = {"vllm:num_requests_waiting": 9.0, "vllm:num_requests_running": 8.0}
        pool = pool_of(fleet, policy="least_loaded")
        await pool.start()
        for i in range(5):
            await pool.run(calling(fleet, str(i)))
        assert fleet.servers["a:80"].answered == []
        assert state(pool, "a").waiting == 9
        await pool.close()

    run(main())


def test_a_pool_lives_on_in_the_next_event_loop() -> None:
    fleet = fleet_of("a", "b")
    clock = {"now": 0.0}
    from coterie.inference.pool import ServerPool

    pool = ServerPool(fleet.specs(), fleet, clock=lambda: clock["now"] + now(), poll_every_s=2.0)

    async def first() -> None:
        await pool.start()
        fleet.servers["a:80"].kill()
        hopeless = asyncio.create_task(pool.run(calling(fleet, "never", 1e6)))
        await asyncio.gather(*(pool.run(calling(fleet, str(i))) for i in range(30)))
        assert state(pool, "a").breaker == "open"
        assert not hopeless.done()
        clock["now"] = now()

    run(first())
    fleet.servers["a:80"].revive()

    async def second() -> None:
        await asyncio.gather(*(pool.run(calling(fleet, str(i))) for i in range(30, 60)))
        await asyncio.sleep(40.0)
        await asyncio.gather(*(pool.run(calling(fleet, str(i))) for i in range(60, 90)))
        assert fleet.servers["a:80"].answered
        assert all(s.in_flight == 0 and s.healthy for s in pool.states())
        asked = len(fleet.asked)
        await asyncio.sleep(10.0)
        assert len(fleet.asked) > asked, "regular looks go on"
        await pool.close()

    run(second())


# -- servers come and go -------------------------------------------------------------------------------------------


def test_a_removed_server_finishes_its_calls_and_is_forgotten() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, policy="round_robin")
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(6)]
        await asyncio.sleep(0.5)
        pool.remove("a:80")
        later = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(6, 12)]
        await asyncio.gather(*calls, *later)
        assert len(fleet.servers["a:80"].answered) == 3
        assert [s.name for s in pool.states()] == ["b:80"]

    run(main())


def test_an_added_server_takes_calls_that_wait() -> None:
    async def main() -> None:
        fleet = fleet_of("a", slots=1)
        pool = pool_of(fleet, max_in_flight=1)
        await pool.start()
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(10)]
        await asyncio.sleep(0.5)
        new = SimServer("b", slots=4)
        fleet.servers[new.name] = new
        pool.add(new.spec)
        await asyncio.gather(*calls)
        assert len(new.answered) >= 3
        await pool.close()

    run(main())


def test_a_call_whose_server_was_removed_under_it_goes_on_elsewhere() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, policy="round_robin")
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(4)]
        await asyncio.sleep(0.5)
        pool.remove("a:80")
        fleet.servers["a:80"].kill()
        assert [a for a, _ in await asyncio.gather(*calls)] == list("0123")
        assert [s.name for s in pool.states()] == ["b:80"]
        await pool.close()

    run(main())


def test_without_any_server_left_waiters_are_sent_away_with_the_reasons() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, max_in_flight=1)
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(4)]
        await asyncio.sleep(0.5)
        pool.retire("a:80", "wrong base")
        pool.remove("b:80")
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(e) for e in ended] == [tuple, tuple, NoServers, NoServers]
        assert "wrong base" in str(ended[2])
        assert not pool.available
        pool.restore("a:80")
        assert (await pool.run(calling(fleet)))[0] == "x"

    run(main())


def test_servers_are_named_once_and_unknown_names_are_told() -> None:
    fleet = fleet_of("alpha", "beta")
    pool = pool_of(fleet)
    with pytest.raises(ConfigError, match="in the pool already"):
        pool.add(fleet.servers["alpha:80"].spec)
    with pytest.raises(ConfigError, match="did you mean 'alpha:80'"):
        pool.remove("alhpa:80")
    with pytest.raises(ConfigError, match="did you mean 'least_loaded'"):
        pool_of(fleet, policy="least_load")
    with pytest.raises(ConfigError, match="max_in_flight"):
        pool_of(fleet, max_in_flight=0)


def test_a_closed_pool_sends_everybody_away() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        await pool.start()
        calls = [asyncio.create_task(pool.run(calling(fleet, str(i)))) for i in range(2)]
        await asyncio.sleep(0.5)
        await pool.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(e) for e in ended] == [tuple, NoServers]
        with pytest.raises(NoServers, match="closed"):
            await pool.run(calling(fleet))

    run(main())


# -- adapters ------------------------------------------------------------------------------------------------------


class Loading:
    """A loader that loads on simulated servers and counts."""

    def __init__(self, fleet: object, seconds: float = 1.0) -> None:
        self.fleet = fleet
        self.seconds = seconds
        self.loads: list[tuple[str, str]] = []
        self.broken: set[str] = set()

    async def __call__(self, server: ServerSpec, adapter: str) -> None:
        self.loads.append((server.name, adapter))
        await asyncio.sleep(self.seconds)
        if server.name in self.broken:
            raise EngineError("rank too large")
        self.fleet.servers[server.name].adapters[adapter] = "/path"  # type: ignore[attr-defined]


def test_a_missing_adapter_is_loaded_once_however_many_miss_it() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        loader = Loading(fleet)
        pool = pool_of(fleet, loader=loader)
        call = calling(fleet, adapter="m-v1")
        answers = await asyncio.gather(*(pool.run(call, needs="m-v1") for _ in range(8)))
        assert len(answers) == 8
        assert loader.loads == [("a:80", "m-v1")]
        assert now() == 2.0
        assert pool.holds("a:80", "m-v1")

    run(main())


def test_calls_go_to_those_who_hold_the_adapter() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b", "c")
        pool = pool_of(fleet, policy="round_robin")
        for name in ("a:80", "c:80"):
            fleet.servers[name].adapters["m-v1"] = "/path"
            pool.mark(name, "m-v1", True)
        await asyncio.gather(*(pool.run(calling(fleet, str(i), adapter="m-v1"), needs="m-v1") for i in range(12)))
        assert [len(s.answered) for s in fleet.servers.values()] == [6, 0, 6]
        pool.mark("a:80", "m-v1", False)
        await asyncio.gather(*(pool.run(calling(fleet, str(i), adapter="m-v1"), needs="m-v1") for i in range(4)))
        assert [len(s.answered) for s in fleet.servers.values()] == [6, 0, 10]

    run(main())


def test_calls_for_another_adapter_do_not_wait_behind_those_whose_server_is_full() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        pool = pool_of(fleet, max_in_flight=1)
        pool.mark("a:80", "x", True)
        pool.mark("b:80", "y", True)
        long = [asyncio.create_task(pool.run(calling(fleet, "x"), needs="x")) for _ in range(5)]
        assert (await pool.run(calling(fleet, "y"), needs="y")) == ("y", 0.0)
        await asyncio.gather(*long)

    run(main())


def test_an_evicted_adapter_is_loaded_again_where_it_was() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        loader = Loading(fleet)
        pool = pool_of(fleet, loader=loader)
        pool.mark("a:80", "m-v1", True)
        faults = Faults()
        assert (await pool.run(calling(fleet, adapter="m-v1"), needs="m-v1", on_fault=faults))[0] == "x"
        assert loader.loads == [("a:80", "m-v1")]
        assert faults.seen == [("a:80", FaultKind.MISSING)]

    run(main())


def test_where_it_cannot_be_loaded_the_call_goes_to_another_server() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        loader = Loading(fleet)
        loader.broken.add("a:80")
        pool = pool_of(fleet, loader=loader, policy="round_robin")
        calls = [pool.run(calling(fleet, str(i), adapter="m-v1"), needs="m-v1") for i in range(6)]
        assert [a for a, _ in await asyncio.gather(*calls)] == [str(i) for i in range(6)]
        assert loader.loads.count(("a:80", "m-v1")) == 1
        assert len(fleet.servers["b:80"].answered) == 6

    run(main())


def test_an_adapter_that_nobody_can_serve_is_an_error_with_the_reason() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        loader = Loading(fleet)
        loader.broken.update(("a:80", "b:80"))
        pool = pool_of(fleet, loader=loader)
        with pytest.raises(ServerFault, match="rank too large") as caught:
            await pool.run(calling(fleet, adapter="m-v1"), needs="m-v1")
        assert caught.value.kind is FaultKind.MISSING
        with pytest.raises(ServerFault, match="no model nobody"):
            await pool_of(fleet).run(calling(fleet, adapter="nobody"))

    run(main())


def test_one_who_misses_it_being_cancelled_does_not_stop_the_load() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        loader = Loading(fleet)
        pool = pool_of(fleet, loader=loader)
        first, second = (asyncio.create_task(pool.run(calling(fleet, n, adapter="m-v1"), needs="m-v1")) for n in "12")
        await asyncio.sleep(0.5)
        first.cancel()
        assert (await second)[0] == "2"
        assert len(loader.loads) == 1

    run(main())


def test_a_restarted_server_has_what_is_wanted_loaded_before_it_takes_calls() -> None:
    async def main() -> None:
        fleet = fleet_of("a", "b")
        loader = Loading(fleet, seconds=3.0)
        pool = pool_of(fleet, loader=loader, policy="round_robin")
        await pool.start()
        for server in fleet.servers.values():
            for name in ("m-v1", "n-v4"):
                server.adapters[name] = "/path"
                pool.mark(server.name, name, True)
        dying = fleet.servers["a:80"]
        faults = Faults()

        async def keep_calling() -> None:
            for i in range(40):
                await pool.run(calling(fleet, str(i), 0.5, adapter="m-v1"), needs="m-v1", on_fault=faults)

        callers = [asyncio.create_task(keep_calling()) for _ in range(6)]
        await asyncio.sleep(2.2)
        dying.kill()
        await asyncio.sleep(1.0)
        before = len(dying.answered)
        dying.revive()
        await asyncio.gather(*callers)
        assert sorted(loader.loads) == [("a:80", "m-v1"), ("a:80", "n-v4")]
        assert len(dying.answered) > before
        assert all(kind is FaultKind.CONNECTION for _, kind in faults.seen), "no call met a missing adapter"
        await pool.close()

    run(main())


def test_a_look_finds_an_adapter_gone_and_has_it_loaded() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        loader = Loading(fleet)
        pool = pool_of(fleet, loader=loader, poll_every_s=2.0)
        await pool.start()
        fleet.servers["a:80"].adapters["m-v1"] = "/path"
        pool.mark("a:80", "m-v1", True)
        await asyncio.sleep(5)
        assert loader.loads == []
        fleet.servers["a:80"].adapters.clear()
        await asyncio.sleep(5)
        assert loader.loads == [("a:80", "m-v1")]
        await pool.close()

    run(main())


def test_who_needs_an_adapter_is_counted_until_it_is_done() -> None:
    async def main() -> None:
        fleet = fleet_of("a")
        pool = pool_of(fleet, max_in_flight=1)
        fleet.servers["a:80"].adapters["m"] = "/path"
        calls = [asyncio.create_task(pool.run(calling(fleet, adapter="m"), needs="m")) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert pool.uses("m") == 3
        calls[2].cancel()
        await pool.unused("m")
        assert now() == 2.0
        assert pool.uses("m") == 0
        await asyncio.gather(*calls, return_exceptions=True)

    run(main())
