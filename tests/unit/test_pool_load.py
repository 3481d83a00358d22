"""How a pool divides load: learnt limits, slow servers, policies, and a whole batch against the fluid limit."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import Callable

import pytest

from coterie.inference.breaker import Breaker, BreakerState
from coterie.inference.limit import FIRST, Limit, Sent
from coterie.inference.pool import ServerPool
from coterie.inference.wire import ServerSpec
from tests.support.virtual import SimFleet, SimServer, now, run


async def batch(
    servers: list[SimServer],
    sizes: list[float],
    *,
    policy: str = "power_of_two",
    at_once: int | None = None,
    kill_half_way: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Do calls of `sizes` seconds; returns the makespan and the fluid limit: all capacity busy all the time."""
    fleet = SimFleet(*servers)
    pool = ServerPool(fleet.specs(), fleet, policy=policy, seed=seed, clock=now, poll_every_s=1.0)
    await pool.start()
    began = now()
    callers = asyncio.Semaphore(at_once or len(sizes))
    done: list[int] = []
    killed: list[float] = []

    async def one(number: int) -> None:
        async def call(server: ServerSpec, remaining_s: float) -> str:
            return await fleet.servers[server.name].serve(str(number), sizes[number])

        async with callers:
            answer, _ = await pool.run(call, timeout_s=1e5)
        assert answer == str(number)
        done.append(number)
        if kill_half_way and len(done) == len(sizes) // 2:
            killed.append(sum(sizes[i] for i in done))
            servers[0].kill()

    await asyncio.gather(*(one(number) for number in range(len(sizes))))
    assert sorted(done) == list(range(len(sizes)))
    answered = Counter(name for server in servers for name in server.answered)
    assert set(answered.values()) == {1}
    rates = [server.slots / server.slow for server in servers]
    before = killed[0] if killed else sum(sizes)
    fluid = before / sum(rates) + (sum(sizes) - before) / (sum(rates[1:]) or 1.0)
    await pool.close()
    return now() - began, fluid


def uneven(slots: int = 8) -> list[SimServer]:
    return [SimServer(f"s{i}", slots=slots, slow=4.0 if i == 3 else 1.0) for i in range(4)]


def sizes_of(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [0.1 * rng.uniform(0.25, 1.75) for _ in range(count)]


@pytest.mark.parametrize(
    ("policy", "seed"),
    [("power_of_two", 0), ("power_of_two", 1), ("power_of_two", 2), ("least_loaded", 0), ("prefix", 0)],
)
def test_a_batch_takes_little_more_than_the_fluid_limit(policy: str, seed: int) -> None:
    """Four servers with eight slots, one four times slower, one killed half-way, 2,000 calls."""
    took, fluid = run(batch(uneven(), sizes_of(2000, seed), policy=policy, at_once=256, kill_half_way=True, seed=seed))
    assert took <= 1.15 * fluid


@pytest.mark.parametrize("policy", ["random", "round_robin"])
def test_policies_that_look_at_nothing_wait_for_the_slow_server(policy: str) -> None:
    sizes = sizes_of(1000, 0)
    plain, _ = run(batch(uneven(), sizes, policy=policy, at_once=64))
    aware, _ = run(batch(uneven(), sizes, at_once=64))
    assert plain > 2 * aware


def test_a_server_four_times_slower_gets_a_quarter_of_a_fast_ones_calls() -> None:
    servers = uneven()
    run(batch(servers, sizes_of(3000, 1)))
    *fast, slow = (len(server.answered) for server in servers)
    assert 0.8 * sum(fast) / 3 / 4 <= slow <= 1.25 * sum(fast) / 3 / 4


def test_with_places_free_elsewhere_a_slow_server_is_left_alone() -> None:
    servers = uneven()
    run(batch(servers, sizes_of(400, 1), at_once=4))
    assert len(servers[3].answered) <= 10


def test_the_last_calls_are_not_given_to_the_slow_server() -> None:
    servers = [SimServer("fast"), SimServer("slow", slow=10.0)]
    took, fluid = run(batch(servers, [1.0] * 400))
    assert took <= 1.1 * fluid
    assert len(servers[1].answered) >= 16


def test_a_server_that_hangs_does_not_hold_back_the_others() -> None:
    async def main() -> None:
        servers = [SimServer("hangs"), SimServer("slow", slow=3.0)]
        fleet = SimFleet(*servers)
        pool = ServerPool(fleet.specs(), fleet, clock=now)

        async def call(server: ServerSpec, remaining_s: float) -> str:
            return await fleet.servers[server.name].serve("x", 1.0)

        await asyncio.gather(*(pool.run(call) for _ in range(40)))
        servers[0].hung = True
        # eight of these hang; the others find out long before any deadline that waiting for `hangs` is in vain
        calls = [asyncio.create_task(pool.run(call, timeout_s=1000.0)) for _ in range(60)]
        await asyncio.sleep(120.0)
        assert sum(task.done() for task in calls) >= 60 - 64 / 2
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await pool.close()

    run(main())


# -- policies ------------------------------------------------------------------------------------------------------


def test_a_prefix_stays_with_its_server_while_that_is_not_past_its_share() -> None:
    async def main() -> None:
        fleet = SimFleet(*(SimServer(f"s{i}") for i in range(4)))
        pool = ServerPool(fleet.specs(), fleet, policy="prefix", clock=now)
        went: dict[int, set[str]] = {}

        async def one(prefix: int) -> None:
            async def call(server: ServerSpec, remaining_s: float) -> str:
                went.setdefault(prefix, set()).add(server.name)
                return await fleet.servers[server.name].serve("x", 1.0)

            await pool.run(call, prefix=prefix)

        for _ in range(5):
            for prefix in range(20):
                await one(prefix)
        assert all(len(servers) == 1 for servers in went.values())
        assert len(set().union(*went.values())) == 4
        hot: Counter[str] = Counter()

        async def same() -> None:
            async def call(server: ServerSpec, remaining_s: float) -> str:
                hot[server.name] += 1
                return await fleet.servers[server.name].serve("x", 1.0)

            await pool.run(call, prefix=7)

        await asyncio.gather(*(same() for _ in range(24)))
        assert len(hot) == 4, "one prefix for all may not overload its server"
        assert max(hot.values()) <= 10

    run(main())


def test_removing_a_server_moves_only_its_own_prefixes() -> None:
    async def where(names: list[str]) -> dict[int, str]:
        fleet = SimFleet(*(SimServer(name) for name in names))
        pool = ServerPool(fleet.specs(), fleet, policy="prefix", clock=now)
        found = {}
        for prefix in range(60):

            async def call(server: ServerSpec, remaining_s: float) -> str:
                return server.name

            found[prefix], _ = await pool.run(call, prefix=prefix)
        return found

    before, after = run(where(["a", "b", "c"])), run(where(["a", "c"]))
    assert all(after[prefix] == name for prefix, name in before.items() if name != "b:80")
    assert any(name == "b:80" for name in before.values())


def test_round_robin_takes_turns_and_random_is_seeded() -> None:
    async def order(policy: str, seed: int) -> list[str]:
        fleet = SimFleet(*(SimServer(f"s{i}") for i in range(3)))
        pool = ServerPool(fleet.specs(), fleet, policy=policy, seed=seed, clock=now)

        async def call(server: ServerSpec, remaining_s: float) -> str:
            return server.name

        return [(await pool.run(call))[0] for _ in range(30)]

    turns = run(order("round_robin", 0))
    assert turns[:3] * 10 == turns
    assert len(set(turns)) == 3
    assert run(order("random", 1)) == run(order("random", 1)) != run(order("random", 2))


# -- limits --------------------------------------------------------------------------------------------------------


def feed(limit: Limit, latency_at: Callable[[int], float], calls: int, seed: int) -> list[int]:
    """Keep `limit` full for so many calls, of which each takes `latency_at(calls under way)` give or take; returns
    the limits after each."""
    rng = random.Random(seed)
    under_way: list[tuple[float, int, Sent, float]] = []
    clock, values = 0.0, []
    for number in range(calls):
        while len(under_way) < limit.value:
            n = len(under_way) + 1
            latency = latency_at(n) * rng.uniform(0.7, 1.3)
            heapq.heappush(under_way, (clock + latency, 1000 * number + n, limit.sent(n), latency))
        clock, _, sent, latency = heapq.heappop(under_way)
        limit.done(sent, latency, 1.0)
        values.append(limit.value)
    for _, _, sent, _ in under_way:
        limit.dropped(sent)
    return values


@pytest.mark.parametrize("knee", [2, 8, 24, 48])
@pytest.mark.parametrize("seed", range(3))
def test_a_limit_finds_where_more_calls_only_queue(knee: int, seed: int) -> None:
    settled = feed(Limit(64), lambda n: max(1.0, n / knee), 3000, seed)[500:]
    assert sum(knee <= value for value in settled) >= 0.85 * len(settled), "the server is kept busy"
    assert sum(value <= max(10, 3 * knee) for value in settled) >= 0.8 * len(settled), (
        "the rest wait where they can be moved"
    )


def test_a_limit_grows_while_a_batching_server_does_more_with_more() -> None:
    limit = Limit(256)
    feed(limit, lambda n: 1.0 + 0.01 * n, 3000, 0)
    assert limit.value >= 128


def test_a_limit_is_never_past_what_is_configured_and_never_below_one() -> None:
    small = Limit(3)
    assert small.value == 3
    feed(small, lambda n: float(n), 500, 0)
    assert 1 <= small.value <= 3
    for _ in range(10):
        small.overloaded()
    assert small.value == 1


def test_a_server_that_says_calls_wait_there_is_given_fewer() -> None:
    limit = Limit(64)
    limit.queued(running=FIRST / 2, waiting=FIRST / 2)
    assert limit.value == FIRST, "as many as run may wait, so that the server is kept busy"
    limit.queued(running=2, waiting=FIRST - 2)
    assert limit.value == 4
    limit.queued(running=200, waiting=500)
    assert limit.value == 4, "what it runs of others' is no reason to give it more"


def test_calls_sent_to_a_server_that_is_hardly_used_teach_no_limit() -> None:
    limit = Limit(64)
    for _ in range(500):
        limit.done(limit.sent(1), random.Random(0).random(), 1.0)
    assert (limit.value, limit.pace) == (FIRST, None)


# -- breaker -------------------------------------------------------------------------------------------------------


def test_a_breaker_opens_on_failures_in_a_row_only() -> None:
    breaker = Breaker(threshold=3)
    for _ in range(5):
        assert not breaker.failed(0.0)
        assert not breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert [breaker.failed(1.0) for _ in range(3)] == [False, False, True]
    assert (breaker.state, breaker.until) == (BreakerState.OPEN, 2.0)


def test_a_breakers_pause_doubles_up_to_its_bound_and_success_forgets_it() -> None:
    breaker = Breaker(pause_s=1.0, longest_pause_s=4.0)
    pauses = []
    for _ in range(4):
        breaker.trip(0.0)
        pauses.append(breaker.until)
        breaker.half_open()
        assert breaker.state is BreakerState.HALF_OPEN
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    assert breaker.failed(10.0), "one failed trial opens it again"
    breaker.half_open()
    breaker.succeeded()
    breaker.trip(0.0)
    assert breaker.until == 1.0
