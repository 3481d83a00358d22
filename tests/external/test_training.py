"""Training on answers of a real vLLM: versions are published, checked and used, and a server that dies costs nothing.

Most of it is about the protocol, so the base is a tiny random Llama, with two vLLMs of its own; one test trains the
embedded model. The game is a matrix game of one turn each: its two prompts never change, so the probability of the same
word can be compared from version to version.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.inference.canary import check, distance, normalised, score
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher, PublishError
from coterie.inference.wire import WireRequest
from coterie.lm.adapters import save_adapter
from coterie.lm.tiny import tiny_random
from coterie.models import LoRAModel, ModelConfig
from coterie.monitor.console import Silent
from coterie.monitor.metrics import UpdateRecord
from coterie.runs.directory import RunDirectory
from coterie.training.policies import TrainedPolicies
from coterie.types import AdapterVersion, Episode, ModelId, Tier, Turn
from tests.external.conftest import SERVED, launch
from tests.external.processes import ServerProcess

UPDATES = 5
TASKS, GROUP = 2, 6
TOLERANCE = 0.1


def run(work: Coroutine[Any, Any, Any], seconds: float = 400) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(bounded())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_random(tmp_path_factory.mktemp("tiny"), seed=0, head_dim=32)


@pytest.fixture(scope="module")
def tiny_servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """Two servers of the tiny model, started together."""
    folder = tmp_path_factory.mktemp("tiny-servers")
    servers = [ServerProcess(f"tiny-{n}", launch(n, tiny, folder), folder) for n in range(2)]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def one(tiny_servers: list[ServerProcess]) -> ServerProcess:
    """The first, up; the other may still be starting."""
    tiny_servers[0].start()
    tiny_servers[0].wait_until_up()
    return tiny_servers[0]


@pytest.fixture
def pair(tiny_servers: list[ServerProcess]) -> list[ServerProcess]:
    """Both, up."""
    for server in tiny_servers:
        server.start()
    for server in tiny_servers:
        server.wait_until_up()
    return tiny_servers


def settings(
    base: Path | str, servers: Sequence[ServerProcess], *, learning_rate: float = 2e-3, **inference: Any
) -> RunConfig:
    return parse_config(
        {
            "updates": UPDATES,
            "models": [{"model_id": name, "lora_rank": 8, "learning_rate": learning_rate} for name in ("a", "b")],
            "base": {"model": str(base), "threads": 1, "dtype": "float32"},
            "scenario": {"id": "matrix", "options": {"game": "matching_pennies"}},
            "mode": "competitive",
            "rollout": {"tasks_per_update": TASKS, "group_size": GROUP},
            "learner": {"entropy_bonus": 0.05, "warmup_updates": 0},
            "engine": {"calibration_tasks": 4},
            "evaluation": {"tasks": 0},
            "inference": {
                "servers": [{"url": server.url} for server in servers], "tiers": ["http"], "timeout_s": 240,
                "poll_every_s": 0.5, "canary_tolerance": TOLERANCE, "policy": "round_robin", **inference,
            },
        }
    )  # fmt: skip


@dataclass
class Played:
    """What a run did, update by update."""

    env: MultiModelEnvironment
    records: list[UpdateRecord] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)

    def turns(self, since: int = 0) -> list[Turn]:
        return [t for e in self.episodes if e.update > since for tr in e.trajectories.values() for t in tr.turns]

    def logprobs(self) -> dict[ModelId, dict[int, dict[tuple[int, ...], float]]]:
        """By model and version: log-probability of each answer it gave to the prompt all versions saw."""
        found: dict[ModelId, dict[int, dict[tuple[int, ...], float]]] = defaultdict(lambda: defaultdict(dict))
        for turn in self.turns():
            assert turn.adapter is not None
            answers = found[turn.adapter.model_id][turn.adapter.version]
            answers.setdefault((*turn.prompt_ids, *turn.token_ids), sum(turn.logprobs))
        return found


@asynccontextmanager
async def playing(config: RunConfig, folder: Path) -> AsyncIterator[Played]:
    """An environment whose every episode is kept, none of which may fail."""
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(folder, config), observer=Silent())
    played = Played(env)
    loop = env._ready()
    keep = loop.keep
    assert keep is not None

    def kept(update: int, episodes: Sequence[Episode], failed: Sequence[Any], record: UpdateRecord | None) -> None:
        assert not failed
        assert record is not None
        played.episodes.extend(episodes)
        played.records.append(record)
        keep(update, episodes, failed, record)

    loop.keep = kept
    try:
        yield played
    finally:
        await env.aclose()


def learned(played: Played, updates: int) -> None:
    """Every update moved every model, and what the servers said is what the learner computes for it."""
    assert len(played.episodes) == updates * TASKS * GROUP
    for model in played.env.models.values():
        assert model.version == model.weight_updates == updates
        assert played.env.base.bank.training(model.model_id).flat.isfinite().all()
    for record in played.records:
        for name in ("a", "b"):
            assert record.metrics[f"learn/{name}/grad_norm"] > 0.0


def versions_differ(played: Played, count: int) -> None:
    """At least `count` versions of each model answered, and each found the same answer differently likely."""
    for by_version in played.logprobs().values():
        assert len(by_version) >= count
        shared = set.intersection(*(set(answers) for answers in by_version.values()))
        assert shared, "no answer was given by every version"
        for answer in shared:
            values = [answers[answer] for _, answers in sorted(by_version.items())]
            assert all(abs(one - other) > 1e-5 for one, other in pairwise(values)), values


async def served_by(server: ServerProcess) -> set[str]:
    control = HttpControl()
    try:
        return set(await control.models(server.spec))
    finally:
        await control.close()


def test_five_versions_of_each_policy_are_published_and_answer_differently(
    one: ServerProcess, tiny: Path, tmp_path: Path
) -> None:
    async def play() -> None:
        async with playing(settings(tiny, [one]), tmp_path / "run") as played:
            await played.env.train_cycles(UPDATES)
            learned(played, UPDATES)
            versions_differ(played, UPDATES)
            assert {turn.tier for turn in played.turns()} == {Tier.HTTP}
            for episode in played.episodes:
                for trajectory in episode.trajectories.values():
                    assert {turn.adapter.version for turn in trajectory.turns} == {episode.update - 1}
            for record in played.records:  # on policy: served and learned log-probabilities are the same
                assert max(record.metrics[f"learn/{name}/mismatch"] for name in ("a", "b")) < 2e-3
            names = {name.rsplit("-", 1)[0] for name in await served_by(one) if name != SERVED}
            # the current one of each, and the two before it
            assert names == {f"{model}-v{version}" for model in ("a", "b") for version in (3, 4, 5)}
        assert await served_by(one) == {SERVED}  # nothing is left behind
        assert not (tmp_path / "run" / "published").exists()

    run(play())


# -- the canary -------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A publisher on one server, and adapters to publish there."""

    policies: TrainedPolicies
    server: ServerProcess
    publisher: Publisher
    control: HttpControl
    transport: HttpTransport
    folder: Path

    def saved(self, version: AdapterVersion, noise: float, seed: int) -> Path:
        """Move the model's adapter by some noise, and save it as `version`."""
        adapter = self.policies.base.bank.training(version.model_id)
        with torch.no_grad():
            adapter.flat.add_(noise * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
        adapter.touch()
        directory = self.folder / f"{version.model_id}-v{version.version}"
        save_adapter(adapter, directory, self.policies.base, version)
        return directory


def on_bench(
    server: ServerProcess, tiny: Path, folder: Path, tag: str, play: Callable[[Bench], Coroutine[Any, Any, None]]
) -> None:
    """Play with a publisher of its own on `server`; `tag` tells its names from all others."""
    config = settings(tiny, [server])
    models = [LoRAModel(ModelConfig(model_id=name, lora_rank=8)) for name in ("a", "b")]
    policies = TrainedPolicies(config, models, lambda model_id: len(model_id))

    async def go() -> None:
        control, transport = HttpControl(), HttpTransport()
        pool = ServerPool([server.spec], control)
        publisher = Publisher(pool, control, transport, quorum=1.0, canary_tolerance=TOLERANCE, tag=tag)
        try:
            await play(Bench(policies, server, publisher, control, transport, folder))
        finally:
            assert await publisher.withdraw() == ()
            await pool.close()
            await control.close()
            await transport.close()

    run(go())


def test_the_canary_passes_what_is_right_and_catches_what_was_swapped(
    one: ServerProcess, tiny: Path, tmp_path: Path
) -> None:
    a, b = AdapterVersion("a", 1), AdapterVersion("b", 1)

    async def play(bench: Bench) -> None:
        of_a = bench.saved(a, 0.2, seed=1)
        bench.saved(b, 0.2, seed=2)
        probe_a, probe_b = bench.policies.probe(a), bench.policies.probe(b)
        assert distance(probe_a.logprobs, probe_b.logprobs) > TOLERANCE
        report = await bench.publisher.publish(a, of_a, probe_a)
        assert report.served_by == (bench.server.spec.name,)
        found = await score(bench.transport, bench.server.spec, report.name, probe_a, 60)
        assert distance(probe_a.logprobs, normalised(found)) < 1e-3
        with pytest.raises(PublishError, match="it serves another adapter or another base"):
            await bench.publisher.publish(b, of_a, probe_b)
        assert bench.publisher.name(b) not in await served_by(bench.server)

    on_bench(one, tiny, tmp_path, "swap", play)


def test_the_canary_catches_the_version_before_under_the_new_ones_name(
    one: ServerProcess, tiny: Path, tmp_path: Path
) -> None:
    """A step too small to be seen against the learner's numbers is seen on the server itself."""
    v1, v2 = AdapterVersion("a", 1), AdapterVersion("a", 2)

    async def play(bench: Bench) -> None:
        old = bench.saved(v1, 0.2, seed=1)
        before = bench.policies.probe(v1)
        await bench.publisher.publish(v1, old, before)
        new = bench.saved(v2, 0.001, seed=2)
        after = bench.policies.probe(v2)
        assert 0 < distance(before.logprobs, after.logprobs) < TOLERANCE
        name = bench.publisher.name(v2)
        await bench.control.load_adapter(bench.server.spec, name, str(old))  # stale: v1's weights as v2
        with pytest.raises(
            PublishError, match="exactly as 'a-v1-stale': the adapter is not applied there, or is stale"
        ):
            await bench.publisher.publish(v2, new, after)
        assert name not in await served_by(bench.server)
        report = await bench.publisher.publish(v2, new, after)
        assert report.served_by == (bench.server.spec.name,)

    on_bench(one, tiny, tmp_path, "stale", play)


def test_the_canary_is_right_beside_turns_under_way_and_harms_none(
    one: ServerProcess, tiny: Path, tmp_path: Path
) -> None:
    """vLLM's CPU build would die here of prompt_logprobs."""
    v1, v2 = AdapterVersion("a", 1), AdapterVersion("a", 2)

    async def play(bench: Bench) -> None:
        spec, rng, enough = bench.server.spec, random.Random(1), asyncio.Event()

        async def turns(model: str) -> int:
            count = 0
            while not enough.is_set():
                prompt = tuple(rng.randrange(20, 300) for _ in range(rng.randrange(5, 60)))
                await bench.transport.call(spec, WireRequest(model, prompt, max_tokens=rng.randrange(1, 12)), 60)
                count += 1
            return count

        first = await bench.publisher.publish(v1, bench.saved(v1, 0.2, seed=1), bench.policies.probe(v1))
        going = [asyncio.create_task(turns(name)) for name in (SERVED, first.name) * 4]
        directory = bench.saved(v2, 0.01, seed=2)
        probe = bench.policies.probe(v2)
        second = await bench.publisher.publish(v2, directory, probe)
        for _ in range(10):
            checks = (check(bench.transport, spec, second.name, probe, tolerance=1e-3, unlike={}) for _ in range(4))
            await asyncio.gather(*checks)
        enough.set()
        assert sum(await asyncio.gather(*going)) > 20
        assert bench.server.alive

    on_bench(one, tiny, tmp_path, "beside", play)


# -- two servers ----------------------------------------------------------------------------------------------------


def test_two_servers_share_a_run_that_is_one_version_behind(
    pair: list[ServerProcess], tiny: Path, tmp_path: Path
) -> None:
    async def play() -> None:
        async with playing(settings(tiny, pair, staleness=1), tmp_path / "run") as played:
            await played.env.train_cycles(UPDATES + 1)
            learned(played, UPDATES + 1)
            versions_differ(played, UPDATES)
            assert {turn.server for turn in played.turns()} == {server.spec.name for server in pair}
            lags = {e.update - 1 - t.turns[0].adapter.version for e in played.episodes for t in e.trajectories.values()}
            assert lags == {0, 1}
            assert max(r.metrics[f"learn/{name}/max_ratio"] for r in played.records for name in ("a", "b")) > 1.0

    run(play())


def test_kill_9_of_one_of_two_costs_no_episode_and_it_comes_back_with_what_is_current(
    pair: list[ServerProcess], tiny: Path, tmp_path: Path
) -> None:
    dying, staying = pair

    async def play() -> None:
        async with playing(settings(tiny, pair), tmp_path / "run") as played:
            env = played.env
            await env.train_cycles(2)
            assert {turn.server for turn in played.turns()} == {dying.spec.name, staying.spec.name}

            training = asyncio.create_task(env.train_cycles(2))
            await asyncio.sleep(0.3)
            assert not training.done()
            await asyncio.to_thread(dying.kill)
            await training
            assert not dying.alive
            await env.train_cycles(1)
            assert {turn.server for turn in played.turns(since=4)} == {staying.spec.name}
            learned(played, 5)

            dying.start()
            await asyncio.to_thread(dying.wait_until_up)
            done = 5
            for _ in range(120):  # it may be half a minute until it is looked at again
                await env.train_cycles(1)
                done += 1
                if dying.spec.name in {turn.server for turn in played.turns(since=done - 1)}:
                    break
                await asyncio.sleep(0.5)
            else:
                raise AssertionError("the server that came back was not used again")
            learned(played, done)
            served = {name.rsplit("-", 1)[0] for name in await served_by(dying)}
            assert {f"a-v{done}", f"b-v{done}"} <= served
            back = [turn for turn in played.turns(since=done - 1) if turn.server == dying.spec.name]
            assert {turn.adapter.version for turn in back} == {done - 1}

    run(play(), 700)


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["camel", "http"])
def test_the_embedded_model_trains_on_vllms_answers(
    vllm: ServerProcess, base_path: Path, tmp_path: Path, tier: str
) -> None:
    # so small that no answer becomes certain, whose probability would be the same in version after version
    config = settings(base_path, [vllm], learning_rate=2e-4, tiers=[tier])

    async def play() -> None:
        async with playing(config, tmp_path / "run") as played:
            updates = UPDATES if tier == "http" else 2
            await played.env.train_cycles(updates)
            learned(played, updates)
            versions_differ(played, updates)
            assert {turn.tier for turn in played.turns()} == {Tier(tier)}
            for record in played.records:
                assert max(record.metrics[f"learn/{name}/mismatch"] for name in ("a", "b")) < 5e-3

    run(play())
