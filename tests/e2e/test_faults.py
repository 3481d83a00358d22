"""The fault matrix: every error of the table in `coterie.inference.wire`, by every tier, streaming or not.

Asked each time: is every call answered, by whom it should be; is a refused one refused once; is nothing done twice,
so that answers given and answers received are equally many; and is a server that was mended used again.

Servers and sockets are real; the clock is not (`tests.support.virtual.HastyLoop`): deadlines and pauses pass when
nothing else is left to happen. One row is gone through on a real clock too. CAMEL itself has its rows in
`tests/external/test_camel_faults.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import EngineError
from coterie.inference import client as client_module
from coterie.inference import speakers
from coterie.inference.client import VLLMClient
from coterie.inference.fake import FakeServer as AnyFakeServer
from coterie.inference.fake import write_adapter
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.ladder import Ladder
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher
from coterie.inference.remote import RemoteEngine
from coterie.inference.simulated import LABEL, SimulatedEngine
from coterie.inference.tiers import TieredEngine
from coterie.inference.wire import FaultKind, ServerFault
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier
from tests.support.engines import LogitEngine
from tests.support.loops import Runs, run
from tests.support.servers import Records
from tests.support.virtual import now, run_hasty

CALLS = 12
TOKENS = 24
PROMPT = tuple(range(20, 60))

# a clock that jumps would close idle connections at the very moment they are used again
FakeServer = partial(AnyFakeServer, keep_alive_s=3600.0)


@dataclass(frozen=True)
class Fault:
    """One row of the table, as a server shows it."""

    name: str
    begin: Callable[[AnyFakeServer], object]
    kinds: tuple[str, ...]
    """How the attempts it spoils are recorded."""
    midway: bool = False
    """Whether part of a streamed answer has arrived by then."""
    last_s: float = 3.0
    """Deadline of a call that meets nothing else."""

    def __str__(self) -> str:
        return self.name


def status(code: int, **fields: Any) -> Callable[[AnyFakeServer], object]:
    return lambda server: server.fail(code, None, **fields)


FAULTS = [
    Fault("refused-connection", lambda s: s.kill(), ("connection",)),
    Fault("reset-midway", lambda s: s.drop(None), ("connection",), midway=True),
    Fault("time-out", lambda s: s.hang(), ("timeout", "connection"), last_s=0.6),
    Fault("asleep", lambda s: s.sleep(), ("timeout", "connection"), last_s=0.6),
    Fault("503", status(503), ("overloaded",), last_s=0.6),
    Fault("503-retry-after", status(503, retry_after=2), ("overloaded",)),
    Fault("429", status(429, retry_after=2), ("overloaded",)),
    Fault("500", status(500), ("server",), last_s=0.6),
    Fault("500-and-ill", lambda s: (status(500)(s), s.fail(503, None, where="health")), ("server",), last_s=0.6),
    Fault("500-midway", status(500, midway=True), ("server",), midway=True, last_s=0.6),
    Fault("502", status(502), ("server",), last_s=0.6),
    Fault("unreadable", lambda s: s.garble(None), ("server", "connection"), last_s=0.6),
    Fault("404", status(404, message="The model `fake-model` does not exist."), ("missing",)),
    Fault("401", status(401), ("unauthorized",)),
    Fault("403", status(403), ("unauthorized",)),
]
REFUSALS = [400, 413, 422]


class ChatOverHttp(HttpTransport):
    """The camel tier's part, chats in and captures out, where camel-ai itself is not installed."""

    tier = Tier.CAMEL


@pytest.fixture(autouse=True)
def clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients look at the clock of their event loop."""
    monkeypatch.setattr(client_module, "ServerPool", partial(ServerPool, clock=now))
    monkeypatch.setattr(client_module, "Ladder", partial(Ladder, clock=now))


@pytest.fixture(params=["http", "camel"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A remote tier of clients."""
    if request.param == "camel":
        monkeypatch.setattr(speakers, "find_spec", lambda name: True)
        monkeypatch.setattr(client_module, "_camel", lambda models, api_key: (ChatOverHttp(), None))
    return str(request.param)


@pytest.fixture
def go() -> Runs:
    """Plays a scene to its end."""
    return partial(run, loop=run_hasty)


async def said(client: VLLMClient, streaming: bool, number: int) -> str:
    if not streaming:
        return await client.generate(f"call {number}", TOKENS, 1.0, seed=number)
    return "".join([piece async for piece in client.stream(f"call {number}", TOKENS, 1.0, seed=number)])


def answered(records: Records, tier: str) -> int:
    return sum(record.outcome == "ok" and record.tier == tier for record in records.kept)


every_fault = pytest.mark.parametrize("fault", FAULTS, ids=str)
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


# -- a client -----------------------------------------------------------------------------------------------------


@every_fault
@both_ways
def test_another_server_answers(go: Runs, tier: str, fault: Fault, streaming: bool) -> None:
    records = Records()

    async def scene() -> None:
        async with FakeServer(seed=1, per_token_s=0.0005) as bad, FakeServer(seed=1, per_token_s=0.0005) as good:
            client = VLLMClient([bad.url, good.url], tiers=(tier,), calls=records, policy="round_robin", timeout_s=2.4)
            async with client:
                whole = [await said(client, False, number) for number in range(CALLS)]
                records.kept.clear()
                before = bad.answered + good.answered
                fault.begin(bad)
                texts = await asyncio.gather(*(said(client, streaming, number) for number in range(CALLS)))
                assert bad.answered + good.answered - before == CALLS  # nothing twice, nothing lost
                assert answered(records, tier) == CALLS
                spoilt = [r for r in records.kept if r.outcome != "ok"]
                assert {r.outcome for r in spoilt} == {"fallback"}
                assert {r.server for r in spoilt} == {bad.spec.name}
                assert {r.fault for r in spoilt} <= set(fault.kinds)
                if not (streaming and fault.midway):
                    assert texts == whole  # a seed is a seed on any server
                else:
                    assert all(texts)

    go(scene())


@every_fault
@both_ways
def test_the_next_tier_answers_when_no_server_can(
    go: Runs, tier: str, fault: Fault, streaming: bool, tiny_path: Path
) -> None:
    records = Records()

    async def scene() -> None:
        async with FakeServer(per_token_s=0.0005) as server:
            client = VLLMClient(
                server.url, tiers=(tier, "local", "simulated"), base=str(tiny_path), calls=records,
                timeout_s=fault.last_s,
            )  # fmt: skip
            async with client:
                assert client.tier == tier
                fault.begin(server)
                texts = await asyncio.gather(*(said(client, streaming, number) for number in range(3)))
                assert len(texts) == 3
                assert not any(text.startswith(LABEL) for text in texts)
                assert answered(records, "local") == 3
                assert answered(records, tier) == server.answered == 0
                assert {r.outcome for r in records.kept if r.tier == tier} == {"fallback"}

    go(scene())


@every_fault
@both_ways
def test_last_of_all_answers_are_simulated_unless_one_was_begun(
    go: Runs, tier: str, fault: Fault, streaming: bool
) -> None:
    async def scene() -> None:
        async with (
            FakeServer(per_token_s=0.0005) as server,
            VLLMClient(server.url, tiers=(tier, "simulated"), timeout_s=fault.last_s) as client,
        ):
            fault.begin(server)
            if streaming and fault.midway and tier == "http":
                with pytest.raises(EngineError, match="broke off"):
                    await said(client, streaming, 0)
            else:
                assert (await said(client, streaming, 0)).startswith(LABEL)
            assert server.answered == 0

    go(scene())


@pytest.mark.parametrize("code", REFUSALS)
@both_ways
def test_a_refusal_is_told_in_the_servers_words_and_never_retried(
    go: Runs, tier: str, code: int, streaming: bool
) -> None:
    records = Records()

    async def scene() -> None:
        async with FakeServer() as one, FakeServer() as two:
            client = VLLMClient([one.url, two.url], tiers=(tier, "local", "simulated"), calls=records, base="/none")
            async with client:
                for server in (one, two):
                    server.fail(code, 1, "this is not acceptable")
                with pytest.raises(ServerFault, match="this is not acceptable") as caught:
                    await said(client, streaming, 0)
                assert caught.value.kind is FaultKind.REJECTED
                assert one.calls + two.calls == 1
                assert [r.outcome for r in records.kept] == ["fault"]
                assert client.tier == tier

    go(scene())


@every_fault
@both_ways
def test_a_mended_server_is_used_again(go: Runs, tier: str, fault: Fault, streaming: bool) -> None:
    async def scene() -> None:
        async with (
            FakeServer() as server,
            VLLMClient(server.url, tiers=(tier, "simulated"), timeout_s=fault.last_s) as client,
        ):
            fault.begin(server)
            try:
                await said(client, streaming, 0)
            except EngineError:
                assert fault.midway
            while server.running:  # it takes a moment to hear that nobody waits any more
                await asyncio.sleep(0.01)
            if fault.name == "refused-connection":
                await server.revive()
            else:
                server.mend()
            for member in client._pool.states():
                if member.retired_because:  # a key is put right by hand
                    client._pool.restore(member.name)
            async with asyncio.timeout(15):
                text = LABEL
                while text.startswith(LABEL):
                    await client.detect()
                    text = await said(client, streaming, 1)
                    await asyncio.sleep(0.3)
            assert server.answered >= 1

    go(scene())


def test_on_a_real_clock_a_hanging_server_is_left_and_used_again_alike() -> None:
    (hangs,) = (fault for fault in FAULTS if fault.name == "time-out")
    test_another_server_answers(run, "http", hangs, False)
    test_a_mended_server_is_used_again(run, "http", hangs, False)


def test_local_and_simulated_answer_whole_and_streamed(go: Runs, tiny_path: Path) -> None:
    async def scene() -> None:
        for tiers, labelled in ((("local", "simulated"), False), (("simulated",), True)):
            async with VLLMClient(tiers=tiers, base=str(tiny_path)) as client:
                whole, streamed = [await said(client, way, 1) for way in (False, True)]
                assert whole == streamed
                assert whole.startswith(LABEL) == labelled

    go(scene())


# -- an engine ----------------------------------------------------------------------------------------------------

A1 = AdapterVersion("a", 1)
CHOICES = ((70,), (80, 81), (80, 82))


@dataclass
class Setup:
    engine: TieredEngine
    bare: RemoteEngine
    servers: Sequence[AnyFakeServer]
    records: Records

    async def play(self, calls: int = CALLS) -> list[Generation]:
        """Free text and choices, half under an adapter."""
        requests = [
            GenerateRequest(
                (*PROMPT, 100 + number), A1 if number % 2 else None, seed=number, max_tokens=6,
                choices=CHOICES if number % 3 == 0 else None,
            )
            for number in range(calls)
        ]  # fmt: skip
        return list(await asyncio.gather(*map(self.engine.generate, requests)))


async def made(servers: Sequence[AnyFakeServer], aside: Path, after: str, timeout_s: float = 2.4) -> Setup:
    records = Records()
    control, transport = HttpControl(), HttpTransport()
    pool = ServerPool([server.spec for server in servers], control, policy="round_robin", clock=now)
    publisher = Publisher(pool, control, transport, quorum=1.0, canary_tolerance=0.01, clock=now)
    bare = RemoteEngine(
        transport, Fleet(pool, control, publisher, closing=(control.close,)), calls=records, timeout_s=timeout_s,
        remembered=0,
    )  # fmt: skip
    following = {"local": LogitEngine(text=(5, 6)), "simulated": SimulatedEngine()}
    engine = TieredEngine([bare, *([following[after]] if after else [])], clock=now)
    await engine.publish(A1, write_adapter(aside / "a1", seed=1))
    return Setup(engine, bare, servers, records)


@every_fault
def test_turns_come_from_another_server_with_the_same_tokens(go: Runs, fault: Fault, tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer(seed=1) as bad, FakeServer(seed=1) as good:
            setup = await made([bad, good], tmp_path, "")
            before = await setup.play()
            setup.records.kept.clear()
            fault.begin(bad)
            turns = await setup.play()
            assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in before]
            assert [turn.logprobs for turn in turns] == [pytest.approx(turn.logprobs) for turn in before]
            assert {turn.tier for turn in turns} == {Tier.HTTP}
            spoilt = [r for r in setup.records.kept if r.outcome != "ok"]
            assert {r.outcome for r in spoilt} <= {"fallback"}
            assert {r.fault for r in spoilt} <= set(fault.kinds)
            await setup.engine.close()

    go(scene())


@every_fault
@pytest.mark.parametrize("after", ["local", "simulated"])
def test_turns_come_from_the_next_tier_when_no_server_can(go: Runs, fault: Fault, after: str, tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer() as server:
            setup = await made([server], tmp_path, after, fault.last_s)
            setup.servers[0].answered = 0
            fault.begin(server)
            turns = await setup.play(6)
            assert {turn.tier for turn in turns} == {Tier(after)}
            assert server.answered == 0
            await setup.engine.close()

    go(scene())


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refused_turn_is_an_error_and_not_another_tiers_turn(go: Runs, code: int, tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer() as one, FakeServer() as two:
            setup = await made([one, two], tmp_path, "simulated")
            await setup.play()
            for server in (one, two):
                server.fail(code, 1, "this is not acceptable")
            calls = one.calls + two.calls
            with pytest.raises(ServerFault, match="this is not acceptable"):
                await setup.engine.generate(GenerateRequest(PROMPT, None, seed=1, max_tokens=2))
            assert one.calls + two.calls == calls + 1
            await setup.engine.close()

    go(scene())


def test_an_adapter_a_server_lost_is_loaded_there_once(go: Runs, tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer(seed=1) as one, FakeServer(seed=1) as two:
            setup = await made([one, two], tmp_path, "simulated")
            before = await setup.play()
            for server in (one, two):
                server.evict("a-v1")
            turns = await setup.play()
            assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in before]
            assert {turn.tier for turn in turns} == {Tier.HTTP}
            assert all("a-v1" in server.loaded for server in (one, two))
            await setup.engine.close()

    go(scene())


def test_prompt_ids_that_changed_on_the_way_are_caught(go: Runs, tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer(seed=1) as one, FakeServer(seed=1) as two:
            setup = await made([one, two], tmp_path, "simulated")
            await setup.play()
            one.retokenise(1000)
            turns = await setup.play()
            assert {turn.server for turn in turns} <= {two.spec.name}
            assert {turn.tier for turn in turns} == {Tier.HTTP}
            await setup.engine.close()

    go(scene())


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"gives_ids": False}, "coterie serve"),
    ],
)
def test_a_server_started_wrongly_is_refused_with_the_flag_it_needs(
    go: Runs, fields: dict[str, Any], flag: str
) -> None:
    async def scene() -> None:
        async with FakeServer(**fields) as server:
            control = HttpControl()
            fleet = Fleet(ServerPool([server.spec], control, clock=now), control, closing=(control.close,))
            engine = RemoteEngine(HttpTransport(), fleet)
            with pytest.raises(EngineError, match=flag):
                await engine.generate(GenerateRequest(PROMPT, None, seed=1, max_tokens=2))
            tiers = TieredEngine([engine, SimulatedEngine()], clock=now)
            turn = await tiers.generate(GenerateRequest(PROMPT, None, seed=1, max_tokens=2))
            assert turn.tier is Tier.SIMULATED
            assert flag in tiers.status()[0].why
            await tiers.close()

    go(scene())
