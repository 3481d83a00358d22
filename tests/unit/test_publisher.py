"""Publication of adapter versions to fake servers: load, canary, flip, rollback, collection, return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coterie.errors import ConfigError, EngineError
from coterie.inference.canary import CanaryError, content_of, distance, score
from coterie.inference.fake import FakePolicy, FakeServer, adapter_weights, token_logprobs, write_adapter
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Probe, Publisher, PublishError, PublishReport
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireReply, WireRequest, server_spec
from coterie.types import AdapterVersion

TOKENS = tuple(range(40, 60))


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


class World:
    """Fake servers, a pool of them, and a publisher."""

    def __init__(self, servers: list[FakeServer], folder: Path, settings: Mapping[str, object]) -> None:
        self.servers = servers
        self.folder = folder
        self.control = Control()
        self.transport = HttpTransport()
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
        return TOKENS, token_logprobs(FakePolicy(0, vocabulary, adapter_weights(directory)), TOKENS)

    async def publish(self, version: int, *, model: str = "m", zero: bool = False) -> PublishReport:
        adapter, directory = self.save(version, model=model, zero=zero)
        return await self.publisher.publish(adapter, directory, self.probe(directory))

    async def ask(self, version: int, model: str = "m") -> tuple[str, tuple[float, ...]]:
        """Which server answers, and the log-probabilities it gives under that version."""
        name = self.publisher.name(AdapterVersion(model, version))

        async def call(server: ServerSpec, remaining_s: float) -> tuple[str, tuple[float, ...]]:
            request = WireRequest(name, TOKENS, max_tokens=1, extra={"prompt_logprobs": 0})
            reply = await self.transport.call(server, request, remaining_s)
            assert reply.prompt_logprobs is not None
            return server.name, reply.prompt_logprobs

        answer, _ = await self.pool.run(call, needs=name, timeout_s=20.0)
        return answer

    def name(self, index: int) -> str:
        return self.servers[index].spec.name


@asynccontextmanager
async def world(count: int, folder: Path, **settings: object) -> AsyncIterator[World]:
    servers = [FakeServer() for _ in range(count)]
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
            assert logprobs == here.probe(directory)[1]

    asyncio.run(main())


def test_answers_change_with_the_version_and_the_old_one_is_served_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(2, tmp_path) as here:
            for version in range(1, 4):
                await here.publish(version)
            for version in range(1, 4):
                _, logprobs = await here.ask(version)
                assert logprobs == here.probe(here.save(version)[1])[1]

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
            for probe in (((5,), ()), ((5, 6), (-1.0, -1.0)), ((5, 6), (float("nan"),))):
                with pytest.raises(EngineError, match=r"a probe of . tokens"):
                    await here.publisher.publish(adapter, directory, probe)
            assert here.control.loads == []
            await here.publisher.publish(adapter, directory, None)
            _, logprobs = await here.ask(1)
            assert logprobs == here.probe(directory)[1]

    asyncio.run(main())


def test_a_server_that_does_not_score_prompts_cannot_be_checked() -> None:
    class Silent(HttpTransport):
        async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
            return WireReply(text="x", finish_reason="length")

    with pytest.raises(CanaryError, match=r"h:1: 'm-v1': 2 log-probabilities of the prompt .* 0 came back"):
        asyncio.run(score(Silent(), server_spec("http://h:1"), "m-v1", (1, 2, 3), 1.0))


def test_what_is_no_number_is_infinitely_far_away() -> None:
    assert distance((-1.0, -2.0), (-1.5, -2.5)) == 0.5
    assert distance((-1.0,), (float("nan"),)) == distance((-1.0,), (float("-inf"),)) == float("inf")


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
            assert (await here.ask(2)) == (here.name(0), here.probe(here.save(2)[1])[1])

    asyncio.run(main())


def test_an_evicted_version_is_loaded_again_and_checked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(1, tmp_path) as here:
            await here.publish(1)
            here.servers[0].evict("m-v1")
            answers = await asyncio.gather(*(here.ask(1) for _ in range(10)))
            assert {logprobs for _, logprobs in answers} == {here.probe(here.save(1)[1])[1]}
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
            assert (await call)[1] == here.probe(tmp_path / "m@v1")[1]
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
