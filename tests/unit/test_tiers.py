"""The ladder of tiers and the engine on it: which tier answers, when one is left, and when it is used again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import ConfigError, EngineError
from coterie.inference.base import Engine
from coterie.inference.ladder import TOLERATED, Ladder, Rung, TierStatus
from coterie.inference.pool import NoServers
from coterie.inference.simulated import LABEL, SimulatedEngine
from coterie.inference.tiers import Recorded, TieredEngine
from coterie.inference.trust import TierFailedError
from coterie.inference.wire import FaultKind, ServerFault
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier
from tests.support.engines import LogitEngine
from tests.support.loops import run as go
from tests.support.servers import MemoryServers, Records, fault

A3 = AdapterVersion("a", 3)
PROMPT = (10, 20, 30)


def ask(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": PROMPT, "adapter": None, "seed": 1, "max_tokens": 2, **fields})


class Subject:
    """What stands on a rung: answers with its name, unless told to fail."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.error: EngineError | None = None
        self.ill: Exception | None = None
        self.asked = self.looked = 0

    async def answer(self) -> Tier:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.tier

    async def detect(self) -> None:
        self.looked += 1
        if self.ill is not None:
            raise self.ill


class Steps:
    """A ladder over subjects, and what it said."""

    def __init__(self, *tiers: Tier, **fields: Any) -> None:
        self.subjects = {tier: Subject(tier) for tier in tiers}
        self.said: list[str] = []
        rungs = [Rung(tier, subject, subject.detect) for tier, subject in self.subjects.items()]
        times = {"first_pause_s": 0.01, "longest_pause_s": 0.04, **fields}
        self.ladder: Ladder[Subject] = Ladder(rungs, on_change=self.said.append, **times)

    async def call(self) -> Tier:
        return await self.ladder.run(lambda subject: subject.answer())

    def __getitem__(self, tier: Tier) -> Subject:
        return self.subjects[tier]


CONNECTION, DOWN = fault(FaultKind.CONNECTION), TierFailedError("it is broken")


def test_only_ladders_that_make_sense_are_made() -> None:
    with pytest.raises(ConfigError, match="no tier"):
        Ladder([])
    with pytest.raises(ConfigError, match="last"):
        Steps(Tier.SIMULATED, Tier.HTTP)
    one = Subject(Tier.HTTP)
    with pytest.raises(ConfigError, match="twice"):
        Ladder([Rung(Tier.HTTP, one, one.detect), Rung(Tier.HTTP, one, one.detect)])


def test_the_first_tier_that_is_up_answers() -> None:
    async def scene() -> None:
        steps = Steps(Tier.CAMEL, Tier.HTTP, Tier.LOCAL)
        steps[Tier.CAMEL].ill = TierFailedError("not installed")
        assert [await steps.call() for _ in range(3)] == [Tier.HTTP] * 3
        assert steps[Tier.CAMEL].asked == 0
        camel, http, local = steps.ladder.status()
        assert (camel.up, camel.in_use, camel.why) == (False, False, "not installed")
        assert camel.retry_in_s <= 0.04
        assert http == TierStatus(Tier.HTTP, True, True, "", 0.0)
        assert (local.up, local.in_use) == (True, False)
        assert steps.said == ["inference by tier http, because camel is down: not installed"]
        await steps.ladder.close()

    go(scene())


@pytest.mark.parametrize("broken", [ImportError("no module"), OSError("refused"), TimeoutError(), EngineError("no")])
def test_whatever_a_look_raises_means_down(broken: Exception) -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL)
        steps[Tier.HTTP].ill = broken
        assert await steps.call() is Tier.LOCAL
        assert steps.ladder.status()[0].why
        await steps.ladder.close()

    go(scene())


@pytest.mark.parametrize("error", [DOWN, NoServers("none left")])
def test_a_tier_that_says_it_cannot_serve_is_left_inside_the_call_and_at_once(error: EngineError) -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL, first_pause_s=60.0, longest_pause_s=60.0)
        assert await steps.call() is Tier.HTTP
        steps[Tier.HTTP].error = error
        assert [await steps.call() for _ in range(3)] == [Tier.LOCAL] * 3
        assert steps[Tier.HTTP].asked == 2
        assert steps.said[1:] == [f"inference by tier local, because http is down: {error}"]
        await steps.ladder.close()

    go(scene())


@pytest.mark.parametrize("kind", [k for k in FaultKind if k is not FaultKind.REJECTED])
def test_single_faults_cost_a_fallback_and_several_in_a_row_the_tier(kind: FaultKind) -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL, first_pause_s=60.0, longest_pause_s=60.0)
        for _ in range(3):  # never TOLERATED in a row
            steps[Tier.HTTP].error = fault(kind)
            assert [await steps.call() for _ in range(TOLERATED - 1)] == [Tier.LOCAL] * (TOLERATED - 1)
            steps[Tier.HTTP].error = None
            assert await steps.call() is Tier.HTTP
        assert len(steps.said) == 1
        steps[Tier.HTTP].error = fault(kind)
        for _ in range(TOLERATED + 2):
            assert await steps.call() is Tier.LOCAL
        assert steps[Tier.HTTP].asked == 3 * TOLERATED + TOLERATED
        assert len(steps.said) == 2
        await steps.ladder.close()

    go(scene())


@pytest.mark.parametrize("error", [fault(FaultKind.REJECTED), EngineError("too long")])
def test_a_refused_request_is_the_requests_own_error(error: EngineError) -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL, Tier.SIMULATED)
        steps[Tier.HTTP].error = error
        with pytest.raises(EngineError) as caught:
            await steps.call()
        assert caught.value is error
        assert steps[Tier.LOCAL].asked == steps[Tier.SIMULATED].asked == 0
        steps[Tier.HTTP].error = None
        assert await steps.call() is Tier.HTTP
        await steps.ladder.close()

    go(scene())


def test_a_tier_that_comes_back_is_used_again_without_being_asked_for() -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL)
        await steps.call()
        steps[Tier.HTTP].error, steps[Tier.HTTP].ill = DOWN, DOWN
        assert await steps.call() is Tier.LOCAL
        await asyncio.sleep(0.15)
        assert steps[Tier.HTTP].looked > 3
        steps[Tier.HTTP].error = steps[Tier.HTTP].ill = None
        await asyncio.sleep(0.1)
        assert steps.ladder.in_use.tier is Tier.HTTP
        assert await steps.call() is Tier.HTTP
        assert steps.said[-1] == "inference by tier http again"
        looked = steps[Tier.HTTP].looked
        await asyncio.sleep(0.1)
        assert steps[Tier.HTTP].looked == looked  # nobody looks when all is well
        await steps.ladder.close()

    go(scene())


def test_looks_become_rarer_while_a_tier_stays_down() -> None:
    now = 0.0

    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL, first_pause_s=1.0, longest_pause_s=8.0, clock=lambda: now)
        steps[Tier.HTTP].ill = DOWN
        await steps.ladder.start()
        pauses = []
        for _ in range(6):
            pauses.append(steps.ladder.status()[0].retry_in_s)
            await steps.ladder.look_again()
        assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
        # a look that succeeds does not yet make it trusted: only an answer does
        steps[Tier.HTTP].ill = None
        await steps.ladder.look_again()
        steps[Tier.HTTP].error = DOWN
        assert await steps.call() is Tier.LOCAL
        assert steps.ladder.status()[0].retry_in_s == 8.0
        steps[Tier.HTTP].error = None
        await steps.ladder.look_again()
        assert await steps.call() is Tier.HTTP
        steps[Tier.HTTP].error = DOWN
        await steps.call()
        assert steps.ladder.status()[0].retry_in_s == 1.0
        await steps.ladder.close()

    go(scene())


def test_many_calls_that_fail_together_are_one_piece_of_news() -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.LOCAL, first_pause_s=1.0, longest_pause_s=60.0, clock=lambda: 0.0)
        await steps.call()
        steps[Tier.HTTP].error = DOWN
        assert set(await asyncio.gather(*(steps.call() for _ in range(50)))) == {Tier.LOCAL}
        assert steps.ladder.status()[0].retry_in_s == 1.0
        assert len(steps.said) == 2
        await steps.ladder.close()

    go(scene())


def test_when_all_are_down_each_is_asked_once_more_before_a_call_fails() -> None:
    async def scene() -> None:
        steps = Steps(Tier.CAMEL, Tier.HTTP, first_pause_s=60.0, longest_pause_s=60.0)
        steps[Tier.CAMEL].ill = steps[Tier.CAMEL].error = DOWN
        steps[Tier.HTTP].ill = steps[Tier.HTTP].error = CONNECTION
        with pytest.raises(EngineError, match=r"camel: it is broken; http: one: connection.*coterie doctor"):
            await steps.call()
        assert "no tier is up" in steps.said[0]
        steps[Tier.HTTP].error = None  # back before anyone has looked
        assert await steps.call() is Tier.HTTP
        assert steps.ladder.in_use.tier is Tier.HTTP
        await steps.ladder.close()

    go(scene())


def test_simulation_is_said_loudly_and_once_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        steps = Steps(Tier.HTTP, Tier.SIMULATED, first_pause_s=60.0, longest_pause_s=60.0)
        steps[Tier.HTTP].ill = DOWN
        assert [await steps.call() for _ in range(5)] == [Tier.SIMULATED] * 5
        assert len(steps.said) == 1
        steps[Tier.HTTP].ill = None
        await steps.ladder.look_again()
        assert await steps.call() is Tier.HTTP
        steps[Tier.HTTP].error = CONNECTION  # the tier stays up, but this call is answered by nobody else
        assert await steps.call() is Tier.SIMULATED
        assert len(steps.said) == 3
        await steps.ladder.close()
        for text in (steps.said[0], steps.said[2]):
            assert "SIMULATED RESPONSES" in text
            assert "no weight will move" in text

    with caplog.at_level(logging.INFO, logger="coterie.tiers"):
        go(scene())
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO", "WARNING"]


def test_a_ladder_lives_on_in_the_next_event_loop() -> None:
    steps = Steps(Tier.HTTP, Tier.LOCAL)
    steps[Tier.HTTP].ill = DOWN
    assert [go(steps.call()) for _ in range(2)] == [Tier.LOCAL] * 2
    steps[Tier.HTTP].ill = None

    async def later() -> Tier:
        await steps.call()
        await steps.ladder.look_again()
        return await steps.call()

    assert go(later()) is Tier.HTTP


# -- the engine ---------------------------------------------------------------------------------------------------


class Local(LogitEngine):
    """An engine in the process: takes no directory, as `LocalEngine`."""

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        assert adapter_dir is None
        await super().publish(version, adapter_dir)


def tiered(*engines: Engine, **fields: Any) -> TieredEngine:
    return TieredEngine(engines, **{"first_pause_s": 0.01, "longest_pause_s": 0.02, **fields})


def test_a_turn_is_not_lost_when_all_servers_die_in_mid_run_and_they_are_used_again() -> None:
    servers, records, said = MemoryServers("one", "two"), Records(), []

    async def scene() -> None:
        engine = tiered(servers.engine(records), Local(text=(5, 6)), on_change=said.append)
        assert (await engine.generate(ask())).tier is Tier.HTTP
        assert engine.tier is Tier.HTTP
        servers.ill.update(("one", "two"))
        for name in ("one", "two"):
            servers.plan[name] = [fault(FaultKind.CONNECTION, name)] * 50
        turns = await asyncio.gather(*(engine.generate(ask(seed=seed)) for seed in range(20)))
        assert {turn.tier for turn in turns} == {Tier.LOCAL}
        assert engine.tier is Tier.LOCAL
        servers.ill.clear()
        servers.plan.clear()
        async with asyncio.timeout(15):
            while engine.tier is not Tier.HTTP:
                await asyncio.sleep(0.02)
        assert (await engine.generate(ask())).tier is Tier.HTTP
        await engine.close()

    go(scene())
    assert {r.outcome for r in records.kept} == {"ok", "fallback"}
    assert len(said) == 3


def test_every_tier_learns_of_every_version_in_its_own_way(tmp_path: Path) -> None:
    servers, local = MemoryServers(), Local()

    async def scene() -> None:
        engine = tiered(servers.engine(), local, SimulatedEngine())
        await engine.publish(A3, tmp_path)
        assert servers.loaded == {"a-v3": str(tmp_path)}
        assert local.published == [A3]
        assert (await engine.generate(ask(adapter=A3))).adapter == A3
        await engine.close()

    go(scene())
    assert servers.generations[-1][1].model == "a-v3"


def test_a_tier_that_missed_a_version_gets_it_before_it_is_used_again(tmp_path: Path) -> None:
    servers, local = MemoryServers(), Local(text=(5,))

    async def scene() -> None:
        engine = tiered(servers.engine(), local)
        servers.ill.add("one")
        await engine.publish(A3, tmp_path)  # known to be down
        assert servers.loaded == {}
        newer = AdapterVersion("a", 4)
        await engine.publish(newer, tmp_path)
        await engine.publish(newer, None)  # once more, to forget what was cached: the directory is not forgotten
        assert (await engine.generate(ask(adapter=newer))).tier is Tier.LOCAL
        servers.ill.clear()
        async with asyncio.timeout(10):
            while engine.tier is not Tier.HTTP:
                await asyncio.sleep(0.01)
        assert servers.loaded == {"a-v4": str(tmp_path)}
        made = await engine.generate(ask(adapter=newer))
        assert (made.tier, made.adapter) == (Tier.HTTP, newer)
        await engine.close()

    go(scene())


def test_a_tier_that_refuses_a_version_is_left_and_the_run_goes_on(tmp_path: Path) -> None:
    servers, said = MemoryServers(), []

    async def refuses(version: AdapterVersion, directory: Path, probe: object) -> object:
        raise EngineError("quorum not reached")

    servers.publish = refuses  # type: ignore[method-assign]

    async def scene() -> None:
        engine = tiered(servers.engine(), Local(text=(5,)), on_change=said.append, first_pause_s=60.0)
        await engine.publish(A3, tmp_path)
        assert (await engine.generate(ask(adapter=A3))).tier is Tier.LOCAL
        await engine.close()
        alone = tiered(servers.engine())
        with pytest.raises(EngineError, match="quorum not reached"):
            await alone.publish(A3, tmp_path)
        await alone.close()

    go(scene())
    assert "quorum not reached" in said[-1]


def test_a_request_no_engine_may_answer_falls_to_nobody(tmp_path: Path) -> None:
    servers = MemoryServers()

    async def scene() -> None:
        engine = tiered(servers.engine(), Local(), SimulatedEngine())
        with pytest.raises(EngineError, match="a@v3"):
            await engine.generate(ask(adapter=A3))
        await engine.close()

    go(scene())


def test_engines_in_the_process_are_recorded_too() -> None:
    records = Records()

    async def scene(engines: Sequence[Engine]) -> None:
        for engine in engines:
            await engine.generate(ask(adapter=A3))
            await engine.publish(A3, None)
            await engine.close()

    local = LogitEngine(text=(5, 6))
    broken = LogitEngine()
    broken.broken = True

    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    go(scene([Recorded(local, records, decode), Recorded(SimulatedEngine(), records)]))
    with pytest.raises(EngineError, match="broken"):
        go(scene([Recorded(broken, records)]))
    one, two, three = records.kept
    assert (one.tier, one.server, one.model, one.adapter, one.outcome) == (Tier.LOCAL, "", "a", A3, "ok")
    assert (one.prompt_tokens, one.completion_tokens, one.text) == (3, 2, "5 6")
    assert (two.tier, two.text) == (Tier.SIMULATED, LABEL)
    assert (three.outcome, three.fault) == ("fault", "EngineError")


def test_what_a_rung_raises_beyond_engine_errors_is_not_swallowed() -> None:
    class Buggy(LogitEngine):
        async def generate(self, request: GenerateRequest) -> Generation:
            raise ZeroDivisionError

    async def scene() -> None:
        engine = tiered(Buggy(), SimulatedEngine())
        with pytest.raises(ZeroDivisionError):
            await engine.generate(ask())
        await engine.close()

    go(scene())
    assert isinstance(CONNECTION, ServerFault)
