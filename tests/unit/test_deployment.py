"""Which engines a run has, by its settings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from coterie.config import InferenceConfig, parse_config
from coterie.errors import ConfigError
from coterie.inference.deployment import Deployment, Weights, server_specs
from coterie.inference.fake import FakeServer, write_adapter
from coterie.inference.simulated import SimulatedEngine
from coterie.types import AdapterVersion, GenerateRequest, Tier
from tests.support.engines import LogitEngine


def _config(**fields: object) -> InferenceConfig:
    return parse_config({"inference": fields}).inference


def test_without_servers_the_first_engine_inside_does_everything() -> None:
    local = LogitEngine()
    deployment = Deployment(_config(), inside=(local, SimulatedEngine()))
    assert deployment.tier is local.tier
    assert not deployment.remote
    (status,) = deployment.status()
    assert (status.tier, status.up, status.in_use) == (local.tier, True, True)


def test_tiers_that_can_never_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inference\.tiers is http: none of them can answer here; name servers"):
        Deployment(_config(tiers=["http"]), inside=(LogitEngine(),))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"servers": [{"url": "gpu1:8000"}]}, "write it as http://host:port"),
        ({"servers": [{"url": "http://gpu1", "api_key_env": "NO_SUCH_KEY"}]}, "NO_SUCH_KEY is not set"),
        ({"servers": [{"url": "http://gpu1"}, {"url": "http://gpu1/v1"}]}, "gpu1 stands there 2 times"),
    ],
)
def test_a_server_that_cannot_be_asked_is_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        server_specs(_config(**fields).servers)


@pytest.mark.parametrize(
    "fields", [{"tiers": []}, {"tiers": ["http", "http"]}, {"staleness": 1}], ids=["none", "twice", "nobody to play"]
)
def test_settings_that_fit_nothing_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="inference"):
        _config(**fields)


def test_a_version_is_saved_loaded_asked_for_and_taken_down(tmp_path: Path) -> None:
    saved: list[AdapterVersion] = []

    def save(version: AdapterVersion, directory: Path) -> None:
        saved.append(version)
        write_adapter(directory, seed=version.version)

    async def go() -> None:
        async with FakeServer() as server:
            deployment = Deployment(
                _config(servers=[{"url": server.url}], tiers=["http"]),
                inside=(SimulatedEngine(),),
                weights=Weights(save, lambda version: None),
                root=tmp_path / "published",
            )
            answers = []
            for number in range(6):
                version = AdapterVersion("a", number)
                await deployment.publish(version)
                await deployment.publish(version)  # again, to forget what was cached: nothing is saved twice
                made = await deployment.generate(GenerateRequest((5, 6, 7), version, seed=1, max_tokens=12))
                assert made.tier is Tier.HTTP
                answers.append(made.token_ids)
            assert len(set(answers)) == 6
            assert saved == [AdapterVersion("a", number) for number in range(1, 6)]
            assert len(server.loaded) == 3  # the current one, and two behind it
            assert len(list((tmp_path / "published").iterdir())) == 3
            await deployment.close()
            assert server.loaded == {}
        assert not (tmp_path / "published").exists()

    asyncio.run(go())


def _deployment(root: Path, servers: Sequence[FakeServer]) -> Deployment:
    return Deployment(
        _config(servers=[{"url": server.url} for server in servers], tiers=["http"]),
        inside=(),
        weights=Weights(lambda version, directory: write_adapter(directory, seed=1), lambda version: None),
        root=root,
    )


@pytest.mark.parametrize("publishes", [True, False], ids=["goes on", "only ends"])
def test_what_a_killed_process_left_is_taken_down_by_the_next_one(tmp_path: Path, publishes: bool) -> None:
    root = tmp_path / "published"

    async def go() -> None:
        async with FakeServer() as one, FakeServer() as two:
            killed = _deployment(root, (one, two))
            await killed.publish(AdapterVersion("a", 1))
            assert len(one.loaded) == len(two.loaded) == len(list(root.iterdir())) == 1
            await killed.rest()  # and nothing more: it is gone
            after = _deployment(root, (one, two))
            if publishes:
                await after.publish(AdapterVersion("a", 2))
                (held,) = one.loaded
                assert held.startswith("a-v2-")
                assert set(two.loaded) == {path.name for path in root.iterdir()} == {held}
            await after.close()
            assert one.loaded == two.loaded == {}
            assert not root.exists()
            await after.close()  # twice is fine

    asyncio.run(go())


def test_what_a_killed_process_left_on_a_server_that_is_away_stays_until_it_is_back(tmp_path: Path) -> None:
    root = tmp_path / "published"

    async def go() -> None:
        async with FakeServer() as one, FakeServer() as two:
            await (killed := _deployment(root, (one, two))).publish(AdapterVersion("a", 1))
            await killed.rest()
            (left,) = root.iterdir()
            two.kill()
            after = _deployment(root, (one, two))
            await after.publish(AdapterVersion("a", 2))
            assert len(one.loaded) == 1
            await after.close()
            assert one.loaded == {}
            assert left.is_dir()
            await two.revive(adapters=True)
            await _deployment(root, (one, two)).close()
            assert two.loaded == {}
            assert not root.exists()

    asyncio.run(go())


def test_files_a_silent_server_may_still_read_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with FakeServer() as server, FakeServer() as other:
            deployment = Deployment(
                _config(servers=[{"url": server.url}, {"url": other.url}], tiers=["http"]),
                inside=(),
                weights=Weights(lambda version, directory: write_adapter(directory, seed=1), lambda version: None),
                root=tmp_path / "published",
            )
            await deployment.publish(AdapterVersion("a", 1))
            server.kill()
            await deployment.close()
            assert other.loaded == {}
        (left,) = (tmp_path / "published").iterdir()
        assert (left / "adapter_model.safetensors").is_file()
        assert "may still read" in caplog.text

    asyncio.run(go())
