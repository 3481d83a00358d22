"""Every config in configs/ can be run: it parses, its parts build, its models fill the seats, it says what it is."""

from __future__ import annotations

import asyncio
import math
from itertools import islice
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from coterie.cli.common import check_parts
from coterie.config import RunConfig, load_config
from coterie.environment import MultiModelEnvironment
from coterie.errors import ConfigError
from coterie.rollout.runner import Plan, Runner
from coterie.runs.directory import RunDirectory
from coterie.scenarios.base import ExactlyMeasured, HasScripts, build_scenario
from coterie.scenarios.oasis.loading import require
from coterie.types import Split
from tests.support.engines import make_services

FOLDER = Path(__file__).parents[2] / "configs"
# those in configs/games need packages of the extra `games`, and tests/games asks the same of them
CONFIGS = sorted(set(FOLDER.glob("**/*.toml")) - set(FOLDER.glob("games/*.toml")))
OASIS = "oasis-campaign"


def _marked(path: Path) -> ParameterSet:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.oasis] if path.stem == OASIS else [])


@pytest.fixture(params=map(_marked, CONFIGS))
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def config(path: Path) -> RunConfig:
    return load_config(path)


@pytest.fixture
def playable(config: RunConfig) -> RunConfig:
    """The config, where what its scenario needs is installed; elsewhere `make test-external` tests it."""
    if config.scenario.id == "oasis":
        try:
            require()
        except ConfigError as error:
            pytest.skip(str(error).partition(";")[0])
    return config


def test_there_are_configs_for_what_the_readme_promises() -> None:
    assert {path.stem for path in CONFIGS} >= {"tasks-cooperative", "signaling", "prisoners-dilemma"}


def test_it_begins_by_saying_what_it_does(path: Path, config: RunConfig) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert config.name == path.stem
    # a machine's own paths and choices do not belong into a shipped config
    assert config.run.folder is None
    assert config.base.model == RunConfig().base.model


def test_its_parts_build_and_its_models_fit(playable: RunConfig) -> None:
    check_parts(playable)
    env = MultiModelEnvironment(config=playable)
    env._check_seats()
    assert env.config == playable


def test_a_run_keeps_it_whole(config: RunConfig, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", config)
    assert RunDirectory.open(tmp_path / "run").config == config


def test_its_targets_can_be_measured(playable: RunConfig) -> None:
    if playable.evaluation.until:
        assert playable.evaluation.every > 0
        assert isinstance(build_scenario(playable.scenario.id, playable.scenario.options), ExactlyMeasured)


@pytest.mark.parametrize("split", Split)
def test_its_tasks_can_be_played(playable: RunConfig, split: Split) -> None:
    config = playable
    env = MultiModelEnvironment(config=config)
    scripts = env.scenario.scripts if isinstance(env.scenario, HasScripts) else {}
    runner = Runner(env.scenario, make_services(mode=config.mode, scripts=scripts, language=config.rollout.language))

    async def play() -> None:
        for number, task in enumerate(islice(env.scenario.tasks(split, config.seed), 10)):
            holders = runner.seating(task, list(env.models.values()), number, config.rollout.rotate_seats)
            episode = await runner.one(Plan(task, holders, f"{split}.{number}", "g", 1, config.rollout.withhold))
            assert math.fsum(episode.rewards.values()) <= task.reward_pool
            assert all(trajectory.turns for trajectory in episode.trajectories.values())

    asyncio.run(play())
