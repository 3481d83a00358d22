"""Publication of adapter versions to fake servers: load, canary, flip, rollback, collection, return."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from coterie.errors import ConfigError, EngineError
from coterie.inference.canary import (
    CanaryError,
    Probe,
    check,
    check_probe,
    content_of,
    distance,
    normalised,
    probe_ids,
    score,
)
from coterie.inference.fake import FakePolicy, FakeServer, adapter_weights, distribution, write_adapter
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher, PublishError, PublishReport
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireReply, WireRequest, server_spec
from coterie.types import AdapterVersion

PROMPT = tuple(range(40, 60))
ALLOWED = probe_ids(PROMPT)
LOG2 = math.log(2.0)


class Control(HttpControl):
    """Real control, with something that happens after a load, and unreachable servers."""

    def __init__(self) -> None:
        super().__init__(timeout_s=5.0)
        self.after_load: Callable[[str, str], None] | None = None
        self.cut_off: set[str] = set()
        self.slow_load = asyncio.Event()
        self.slow_load.set()
        self.loads: list[tuple[str, str]] = []

    async def load_adapter(self, server: ServerSpec, name: str, path: str) -> None:
        self._reach(server)
        self.loads.append((server.name, name))
        await self.slow_load.wait()
        await super().load_adapter(server, name, path)
        if self.after_load is not None:
            self.after_load(server.name, name)

    async def unload_adapter(self, server: ServerSpec, name: str) -> None:
        self._reach(server)
        await super().unload_adapter(server, name)

    async def health(self, server: ServerSpec) -> None:
        self._reach(server)
        await super().health(server)

    def _reach(self, server: ServerSpec) -> None:
        if server.name in self.cut_off:
            raise ServerFault(FaultKind.CONNECTION, server.name, "no route to host")


class Crossing(HttpTransport):
    """Where `crossed` is set, the base answers as that served name, as vLLM's CPU build mixes them up in one step."""

    crossed = ""

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        if self.crossed and request.model == "fake-model":
            request = replace(request, model=self.crossed)
        return await super().call(server, request, timeout_s)


class World:
    """Fake servers, a pool of them, and a publisher."""

    def __init__(self, servers: list[FakeServer], folder: Path, settings: Mapping[str, object]) -> None:
        self.servers = servers
        self.folder = folder
        self.control = Control()
        self.transport = Crossing()
        self.pool = ServerPool([s.spec for s in servers], self.control, poll_every_s=0.2)
        given = {"quorum": 0.5, "canary_tolerance": 0.05, **settings}
        self.publisher = Publisher(self.pool, self.control, self.transport, **given)  # type: ignore[arg-type]

    def save(self, version: int, *, model: str = "m", zero: bool = False) -> tuple[AdapterVersion, Path]:
        adapter = AdapterVersion(model, version)
        directory = self.folder / adapter.name
        if not directory.exists():
            write_adapter(directory, seed=100 * len(model) + version, zero=zero)
        return adapter, directory

    def probe(self, directory: Path) -> Probe:
        """What a learner with the adapter in `directory` computes."""
        vocabulary = self.servers[0].tokenizer.vocabulary
        logs = distribution(FakePolicy(0, vocabulary, adapter_weights(directory)), PROMPT, allowed=ALLOWED)
        return Probe(PROMPT, ALLOWED, tuple(logs[token] for token in ALLOWED))

    async def publish(self, version: int, *, model: str = "m", zero: bool = False) -> PublishReport:
        adapter, directory = self.save(version, model=model, zero=zero)
        return await self.publisher.publish(adapter, directory, self.probe(directory))

    async def ask(self, version: int, model: str = "m") -> tuple[str, tuple[float, ...]]:
        """Which server answers, and the log-probabilities it gives under that version."""
        name = self.publisher.name(AdapterVersion(model, version))

        async def call(server: ServerSpec, remaining_s: float) -> tuple[str, tuple[float, ...]]:
            request = WireRequest(name, PROMPT, max_tokens=1, allowed=ALLOWED, top=len(ALLOWED))
            reply = await self.transport.call(server, request, remaining_s)
            assert reply.top_logprobs is not None
            return server.name, tuple(reply.top_logprobs[0][token] for token in ALLOWED)

        answer, _ = await self.pool.run(call, needs=name, timeout_s=20.0)
        return answer

    def name(self, index: int) -> str:
        return self.servers[index].spec.name


@asynccontextmanager
async def world(count: int, folder: Path, *, latency_s: float = 0.0, **settings: object) -> AsyncIterator[World]:
    servers = [FakeServer(latency_s=latency_s, cpu_build=True) for _ in range(count)]
    for server in servers:
        await server.__aenter__()
    here = World(servers, folder, settings)
    try:
        yield here
    finally:
        await here.pool.close()
        await here.transport.close()
        await here.control.close()
        for server in servers:
            await server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_version_is_served_everywhere_and_answers_as_the_learner_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            adapter, directory = here.save(1)
            report = await here.publisher.publish(adapter, directory, here.probe(directory))
            assert sorted(report.served_by) == sorted([here.name(0), here.name(1)])
            assert (report.version, report.name, dict(report.failed)) == (adapter, "m-v1", {})
            assert report.seconds > 0
            for server in here.servers:
                assert dict(server.loaded) == {"m-v1": str(directory.absolute())}
            _, logprobs = await here.ask(1)
            assert logprobs == here.probe(directory).logprobs

    asyncio.run(main())


def test_answers_change_with_the_version_and_the_old_one_is_served_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            for version in range(1, 4):
                await here.publish(version)
            for version in range(1, 4):
                _, logprobs = await here.ask(version)
                assert logprobs == here.probe(here.save(version)[1]).logprobs

    asyncio.run(main())


def test_servers_that_see_the_files_elsewhere_are_given_their_own_path(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path / "ours") as here:
            (tmp_path / "theirs").symlink_to(tmp_path / "ours")
            spec = here.servers[0].spec
            here.pool.remove(spec.name)
            paths = ((str(tmp_path / "ours"), str(tmp_path / "theirs")),)
            here.pool.add(ServerSpec(spec.url, spec.name, paths=paths))
            await here.publish(1)
            assert here.servers[0].loaded["m-v1"] == str(tmp_path / "theirs" / "m@v1")

    asyncio.run(main())


# -- the canary ----------------------------------------------------------------------------------------------------


def test_a_server_that_answers_with_other_weights_leaves_the_pool(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            here.control.after_load = lambda server, name: (
                here.servers[1].serve_stale(name) if server == here.name(1) else None
            )
            report = await here.publish(1)
            assert report.served_by == (here.name(0),)
            assert "differ from the learner's" in report.failed[here.name(1)]
            assert [s.name for s in here.pool.healthy()] == [here.name(0)]
            assert "m-v1" not in here.servers[1].loaded
            assert {(await here.ask(1))[0] for _ in range(4)} == {here.name(0)}

    asyncio.run(main())


@pytest.mark.parametrize("like", ["fake-model", "m-v1"])
def test_a_change_too_small_for_the_tolerance_is_still_told_from_no_change(tmp_path: Path, like: str) -> None:
    """With a huge tolerance only the comparison on the same server can find an adapter that is not applied."""

    async def main() -> None:
        async with world(1, tmp_path, canary_tolerance=100.0) as here:
            await here.publish(1)
            here.control.after_load = lambda server, name: here.servers[0].serve_stale(name, like=like)
            with pytest.raises(PublishError, match=f"answers exactly as '{like}'"):
                await here.publish(2)
            here.control.after_load = None
            await here.publish(3)

    asyncio.run(main())


def test_an_untrained_adapter_may_answer_as_the_base_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            await here.publish(0, zero=True)
            await here.publish(1)

    asyncio.run(main())


def test_equal_content_under_a_new_number_is_no_stale_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            await here.publish(1)
            again = AdapterVersion("m", 2)
            directory = write_adapter(tmp_path / again.name, seed=101)
            assert content_of(directory).digest == content_of(here.save(1)[1]).digest
            await here.publisher.publish(again, directory, here.probe(directory))

    asyncio.run(main())


def test_a_probe_that_says_nothing_is_refused_and_none_is_needed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            adapter, directory = here.save(1)
            with pytest.raises(CanaryError, match="a probe of 1 prompt tokens, 0 allowed ones and 0 log-prob"):
                await here.publisher.publish(adapter, directory, Probe((5,), (), ()))
            assert here.control.loads == []
            await here.publisher.publish(adapter, directory, None)
            _, logprobs = await here.ask(1)
            assert logprobs == here.probe(directory).logprobs

    asyncio.run(main())


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (Probe((), (1, 2), (-LOG2, -LOG2)), "give a prompt, and 2 to 20 different tokens"),
        (Probe((5,), (1,), (0.0,)), "give a prompt, and 2 to 20 different tokens"),
        (Probe((5,), (1, 1), (-LOG2, -LOG2)), "give a prompt, and 2 to 20 different tokens"),
        (Probe((5,), tuple(range(21)), (-math.log(21.0),) * 21), "give a prompt, and 2 to 20 different tokens"),
        (Probe((5,), (1, 2), (-LOG2,)), "the finite log-probability of each"),
        (Probe((5,), (1, 2), (0.0, -math.inf)), "the finite log-probability of each"),
        (Probe((5,), (1, 2), (math.nan, -LOG2)), "the finite log-probability of each"),
        (Probe((5,), (1, 2), (-LOG2, -2 * LOG2)), "normalised"),
        (Probe((5,), (1, 2), (1e9, -LOG2)), "normalised"),
    ],
)
def test_what_is_wrong_with_a_probe_is_said(probe: Probe, said: str) -> None:
    check_probe(Probe((5,), (1, 2), (-LOG2, -LOG2)))
    with pytest.raises(CanaryError, match=said):
        check_probe(probe)


def test_the_tokens_of_a_probe_are_the_last_different_ones_of_its_prompt() -> None:
    assert probe_ids((9, 1, 2, 3, 2, 4, 3), without=(4,)) == (3, 2, 1, 9)
    assert probe_ids(range(100)) == tuple(range(99, 83, -1))
    assert probe_ids(range(100), count=2) == (99, 98)


class Answering(HttpTransport):
    """Answers every request with the same log-probabilities."""

    def __init__(self, *top: Mapping[int, float]) -> None:
        super().__init__()
        self.top = top

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        return WireReply(text="x", finish_reason="length", top_logprobs=self.top or None)


@pytest.mark.parametrize(("top", "came"), [((), 0), (({1: -1.0, 9: -0.5, 8: -2.0},), 1)])
def test_a_server_that_does_not_tell_what_is_asked_cannot_be_checked(top: tuple[dict[int, float]], came: int) -> None:
    probe = Probe((5,), (1, 2), (-LOG2, -LOG2))
    said = rf"h:1: 'm-v1': .* 2 allowed tokens were asked for .*, those of {came} came back.*processed_logprobs"
    with pytest.raises(CanaryError, match=said):
        asyncio.run(score(Answering(*top), server_spec("http://h:1"), "m-v1", probe, 1.0))


def test_log_probabilities_over_the_vocabulary_are_scored_as_those_over_the_allowed_tokens() -> None:
    probe = Probe((5,), (1, 2), (-LOG2, -LOG2))

    async def checked(*top: Mapping[int, float]) -> None:
        server = server_spec("http://h:1")
        await check(Answering(*top), server, "m-v1", probe, tolerance=1e-9, unlike={})

    asyncio.run(checked({1: -LOG2, 2: -LOG2}))
    asyncio.run(checked({7: -0.01, 1: -30.0, 2: -30.0}))  # raw_logprobs
    with pytest.raises(CanaryError, match=r"by 0\.5 nats"):
        asyncio.run(checked({7: -0.01, 1: -30.0, 2: -31.0}))


def test_what_is_normalised_sums_to_one_however_small_it_was() -> None:
    assert normalised((-800.0, -800.0 - LOG2)) == pytest.approx((math.log(2 / 3), math.log(1 / 3)))
    assert all(map(math.isnan, normalised((-1.0, -math.inf))))


def test_what_is_no_number_is_infinitely_far_away() -> None:
    assert distance((-1.0, -2.0), (-1.5, -2.5)) == 0.5
    assert distance((-1.0,), (float("nan"),)) == distance((-1.0,), (float("-inf"),)) == float("inf")


def test_a_check_beside_turns_under_way_does_not_kill_the_server(tmp_path: Path) -> None:
    """A server that comes back checks several versions at once, and vLLM's CPU build dies of `prompt_logprobs` then."""

    async def main() -> None:
        async with world(1, tmp_path, latency_s=0.02) as here:
            (server,) = here.servers
            await here.publish(1)
            turns = [asyncio.create_task(here.ask(1)) for _ in range(4)]
            await asyncio.gather(
                *(here.publish(version, model=model) for version in (2, 3) for model in ("m", "other"))
            )
            await asyncio.gather(*turns)
            assert server.most_running > 2
            canaries = [body for body in server.requests if "cache_salt" in body]
            assert len(canaries) >= 5 * 2  # each version, and what it must not answer as
            for body in canaries:
                assert "prompt_logprobs" not in body
                assert "seed" not in body
                assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (1, 1.0, len(ALLOWED))
            assert len({body["cache_salt"] for body in canaries}) == len(canaries)

    asyncio.run(main())


def test_a_base_that_answers_as_the_new_version_from_then_on_makes_no_false_alarm(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:

            def mix_up(server: str, name: str) -> None:
                here.transport.crossed = name

            here.control.after_load = mix_up
            for version in (1, 2):
                assert (await here.publish(version)).served_by == (here.name(0),)

    asyncio.run(main())


def test_a_check_is_answered_by_the_weights_and_not_by_a_cache_of_what_had_the_name_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            await here.publish(1)
            write_adapter(tmp_path / "m@v1", seed=7)  # behind the publisher's back
            async with aiohttp.ClientSession() as session:
                body = {"lora_name": "m-v1", "lora_path": str(tmp_path / "m@v1"), "load_inplace": True}
                async with session.post(here.servers[0].url + "/load_lora_adapter", json=body) as response:
                    assert response.status == 200
            probe = here.probe(tmp_path / "m@v1")
            found = await score(here.transport, here.servers[0].spec, "m-v1", probe, 5.0)
            assert distance(normalised(found), probe.logprobs) < 1e-9
            _, cached = await here.ask(1)
            assert distance(cached, probe.logprobs) > 0.05

    asyncio.run(main())


# -- quorum and rollback -------------------------------------------------------------------------------------------


def test_without_quorum_nothing_changes(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(3, tmp_path, quorum=0.6) as here:
            await here.publish(1)
            for server in here.servers[:2]:
                server.fail(500, times=1, message="LoRA rank 512 is greater than max_lora_rank 16", where="adapters")
            with pytest.raises(PublishError, match=r"1 servers hold it, 2 must.*max_lora_rank"):
                await here.publish(2)
            assert len(here.pool.healthy()) == 3
            assert all(set(server.loaded) == {"m-v1"} for server in here.servers)
            await here.ask(1)
            with pytest.raises(EngineError):
                await here.ask(2)
            assert here.save(2)[1].is_dir()
            report = await here.publish(2)
            assert len(report.served_by) == 3

    asyncio.run(main())


def test_a_server_that_failed_comes_back_with_the_next_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            here.servers[0].fail(500, times=1, message="rank too large", where="adapters")
            await here.publish(1)
            (gone,) = [state for state in here.pool.states() if not state.healthy]
            assert gone.name == here.name(0)
            assert "rank too large" in gone.retired_because
            report = await here.publish(2)
            assert len(report.served_by) == 2
            assert len(here.pool.healthy()) == 2

    asyncio.run(main())


def test_a_server_that_others_retired_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            here.servers[0].fail(500, times=1, where="adapters")
            await here.publish(1)
            here.pool.restore(here.name(0))
            here.pool.retire(here.name(0), "the user does not want it")
            report = await here.publish(2)
            assert report.served_by == (here.name(1),)

    asyncio.run(main())


def test_a_load_is_tried_again_when_the_server_is_full(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            here.servers[0].fail(503, times=2, where="adapters")
            report = await here.publish(1)
            assert report.served_by == (here.name(0),)
            assert len(here.control.loads) == 3

    asyncio.run(main())


def test_bad_input_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            adapter, _ = here.save(1)
            with pytest.raises(EngineError, match="no adapter in"):
                await here.publisher.publish(adapter, tmp_path / "nowhere", None)
            await here.publish(1)
            with pytest.raises(PublishError, match="a version never changes"):
                await here.publisher.publish(adapter, here.save(2)[1], None)
            with pytest.raises(PublishError, match="not published"):
                await here.publisher.load(here.servers[0].spec, "m-v9")
            here.pool.retire(here.name(0), "gone")
            with pytest.raises(PublishError, match="no server is healthy"):
                await here.publish(2)
            for wrong in ({"quorum": 0.0}, {"quorum": 1.5}, {"canary_tolerance": 0.0}, {"keep": -1}):
                with pytest.raises(ConfigError):
                    World(here.servers, tmp_path, wrong)

    asyncio.run(main())


def test_runs_that_share_servers_are_kept_apart_by_a_tag(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path, tag="run7") as here:
            await here.publish(1)
            assert set(here.servers[0].loaded) == {"m-v1-run7"}

    asyncio.run(main())


# -- servers that come back ----------------------------------------------------------------------------------------


def test_a_restarted_server_gets_what_is_current_before_it_takes_calls(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            await here.pool.start()
            await here.publish(1)
            await here.publish(4, model="other")
            here.servers[0].kill()
            assert {(await here.ask(1))[0] for _ in range(6)} == {here.name(1)}
            report = await here.publish(2)
            assert report.served_by == (here.name(1),)
            await here.servers[0].revive()
            await until(lambda: len(here.pool.healthy()) == 2 or here.pool.states()[0].breaker == "half_open")
            assert set(here.servers[0].loaded) == {"m-v1", "m-v2", "other-v4"}
            here.pool.retire(here.name(1), "to see the other one")
            assert (await here.ask(2)) == (here.name(0), here.probe(here.save(2)[1]).logprobs)

    asyncio.run(main())


def test_a_server_on_trial_is_given_new_versions_too(tmp_path: Path) -> None:
    """Else versions that follow fast upon each other are never there when their calls are given out."""

    async def main() -> None:
        async with world(2, tmp_path, quorum=1.0) as here:
            await here.pool.start()
            await here.publish(1)
            here.servers[0].kill()
            assert {(await here.ask(1))[0] for _ in range(6)} == {here.name(1)}
            await here.servers[0].revive()
            await until(lambda: here.pool.states()[0].breaker == "half_open")
            report = await here.publish(2)
            assert set(report.served_by) == {here.name(0), here.name(1)}
            await until(lambda: here.pool.states()[0].breaker == "half_open")
            here.servers[0].fail(503, times=9, where="adapters")
            report = await here.publish(3)
            assert report.served_by == (here.name(1),), "it does not count towards the quorum"

    asyncio.run(main())


def test_an_evicted_version_is_loaded_again_and_checked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            await here.publish(1)
            here.servers[0].evict("m-v1")
            answers = await asyncio.gather(*(here.ask(1) for _ in range(10)))
            assert {logprobs for _, logprobs in answers} == {here.probe(here.save(1)[1]).logprobs}
            assert len(here.control.loads) == 2
            here.servers[0].evict("m-v1")
            here.control.after_load = lambda server, name: here.servers[0].serve_stale(name)
            with pytest.raises(ServerFault, match="differ from the learner's"):
                await here.ask(1)

    asyncio.run(main())


# -- collection ----------------------------------------------------------------------------------------------------


def test_old_versions_are_unloaded_everywhere_and_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path, keep=1) as here:
            for version in range(1, 5):
                await here.publish(version)
            await here.publish(1, model="other")
            frozen = AdapterVersion("m", 2)
            gone = await here.publisher.collect({"m": 4}, also=(frozen,))
            assert gone == (AdapterVersion("m", 1),)
            for server in here.servers:
                assert set(server.loaded) == {"m-v2", "m-v3", "m-v4", "other-v1"}
            assert sorted(p.name for p in tmp_path.iterdir()) == ["m@v2", "m@v3", "m@v4", "other@v1"]
            assert await here.publisher.collect({"m": 4}) == (frozen,)
            with pytest.raises(EngineError, match="collected because it is too old"):
                await here.ask(1)
            for version in (3, 4):
                await here.ask(version)

    asyncio.run(main())


def test_a_version_in_use_is_drained_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path, keep=0) as here:
            await here.publish(1)
            await here.publish(2)
            here.servers[0].hang()
            call = asyncio.create_task(here.ask(1))
            await until(lambda: here.servers[0].running == 1)
            collecting = asyncio.create_task(here.publisher.collect({"m": 2}))
            await asyncio.sleep(0.2)
            assert not collecting.done()
            assert "m-v1" in here.servers[0].loaded
            here.servers[0].wake()
            assert (await call)[1] == here.probe(tmp_path / "m@v1").logprobs
            assert await collecting == (AdapterVersion("m", 1),)
            assert not (tmp_path / "m@v1").exists()

    asyncio.run(main())


def test_a_version_that_is_asked_for_all_the_time_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path, keep=0, drain_s=0.1) as here:
            await here.publish(1)
            await here.publish(2)
            here.servers[0].hang()
            call = asyncio.create_task(here.ask(1))
            await until(lambda: here.servers[0].running == 1)
            assert await here.publisher.collect({"m": 2}) == ()
            assert (tmp_path / "m@v1").is_dir()
            here.servers[0].wake()
            await call
            assert await here.publisher.collect({"m": 2}) == (AdapterVersion("m", 1),)

    asyncio.run(main())


def test_what_a_server_may_still_read_is_not_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path, keep=0) as here:
            await here.publish(1)
            await here.publish(2)
            here.control.cut_off.add(here.name(0))
            assert await here.publisher.collect({"m": 2}) == (AdapterVersion("m", 1),)
            assert (tmp_path / "m@v1").is_dir(), "one server could not be told"
            assert "m-v1" not in here.servers[1].loaded
            # also when it has left the pool: it may run on
            here.pool.remove(here.name(0))
            await here.publisher.collect({"m": 2})
            assert (tmp_path / "m@v1").is_dir()
            here.control.cut_off.clear()
            await here.publisher.collect({"m": 2})
            assert not (tmp_path / "m@v1").exists()
            assert "m-v1" not in here.servers[0].loaded

    asyncio.run(main())


def test_a_load_under_way_is_over_before_its_directory_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path, keep=0) as here:
            await here.publish(1)
            await here.publish(2)
            here.servers[0].evict("m-v1")
            here.control.slow_load.clear()
            loading = asyncio.create_task(here.publisher.load(here.servers[0].spec, "m-v1"))
            await until(lambda: len(here.control.loads) == 3)
            collecting = asyncio.create_task(here.publisher.collect({"m": 2}))
            await asyncio.sleep(0.2)
            assert (tmp_path / "m@v1").is_dir()
            here.control.slow_load.set()
            await loading
            await collecting
            assert "m-v1" not in here.servers[0].loaded
            assert not (tmp_path / "m@v1").exists()

    asyncio.run(main())


def test_after_a_load_that_was_never_answered_nothing_is_deleted_for_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        now = [0.0]
        async with world(2, tmp_path, keep=0, clock=lambda: now[0]) as here:
            here.servers[0].fail(503, times=None, where="adapters")
            await here.publish(1)
            here.servers[0].mend()
            await here.publish(2)
            await here.publisher.collect({"m": 2})
            assert (tmp_path / "m@v1").is_dir(), "the load may have arrived after all"
            now[0] = 1000.0
            await here.publisher.collect({"m": 2})
            assert not (tmp_path / "m@v1").exists()

    asyncio.run(main())


def test_at_the_end_everything_is_taken_down_but_what_a_silent_server_may_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            for version in (1, 2):
                await here.publish(version)
            await here.publish(1, model="other")
            here.servers[0].kill()
            left = await here.publisher.withdraw()
            assert {path.name for path in left} == {"m@v1", "m@v2", "other@v1"}
            assert all(path.is_dir() for path in left)
            assert here.servers[1].loaded == {}
            await here.servers[0].revive()
            assert await here.publisher.withdraw() == ()  # it holds nothing any more, and says so
            assert list(tmp_path.iterdir()) == []

    asyncio.run(main())
