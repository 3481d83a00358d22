"""Ending a run early, when an exact metric is good enough."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.errors import ConfigError
from coterie.runs.directory import RunDirectory


def _config(tiny: Path, scenario: str = "signaling", **evaluation: Any) -> RunConfig:
    return parse_config(
        {
            "updates": 4,
            "base": {"model": str(tiny), "threads": 1},
            "scenario": {"id": scenario},
            "models": [{"model_id": "a"}, {"model_id": "b"}, {"model_id": "c"}][: 2 if scenario == "signaling" else 3],
            "rollout": {"tasks_per_update": 2, "group_size": 2},
            "evaluation": {"tasks": 0, **evaluation},
        }
    )


def test_a_target_that_is_met_ends_the_run_and_a_resumed_run_stays_ended(tiny_path: Path, tmp_path: Path) -> None:
    config = _config(tiny_path, every=2, until={"success": 0.01})
    run = RunDirectory.create(tmp_path / "run", config)
    env = MultiModelEnvironment.from_config(config, run_dir=run)
    first = asyncio.run(env.train())
    asyncio.run(env.aclose())
    assert (first.completed, first.update) == (True, 2)
    again = MultiModelEnvironment.resume(run)
    second = asyncio.run(again.train())
    asyncio.run(again.aclose())
    assert (second.completed, second.update) == (True, 2)


def test_a_target_out_of_reach_does_not_end_it(tiny_path: Path) -> None:
    env = MultiModelEnvironment.from_config(_config(tiny_path, every=1, until={"success": 1.01}))
    assert asyncio.run(env.train()).update == 4


def test_a_target_nobody_measures_is_an_error(tiny_path: Path) -> None:
    env = MultiModelEnvironment.from_config(_config(tiny_path, every=1, until={"sucess": 0.9}))
    with pytest.raises(ConfigError, match=r"'sucess'.*did you mean 'success'"):
        asyncio.run(env.train())
    with pytest.raises(ConfigError, match="'tasks' has no exact metrics"):
        MultiModelEnvironment(config=_config(tiny_path, "tasks", every=1, until={"success": 0.9}))
    with pytest.raises(ConfigError, match="set every"):
        _config(tiny_path, until={"success": 0.9})
