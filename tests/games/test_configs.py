"""Every config in configs/games can be run: what tests/unit/test_configs.py asks of all configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_configs import (
    FOLDER,
    config,
    playable,
    test_a_run_keeps_it_whole,
    test_it_begins_by_saying_what_it_does,
    test_its_parts_build_and_its_models_fit,
    test_its_targets_can_be_measured,
    test_its_tasks_can_be_played,
)

__all__ = [
    "config",
    "playable",
    "test_a_run_keeps_it_whole",
    "test_it_begins_by_saying_what_it_does",
    "test_its_parts_build_and_its_models_fit",
    "test_its_targets_can_be_measured",
    "test_its_tasks_can_be_played",
]

CONFIGS = sorted(FOLDER.glob("games/*.toml"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_there_is_one_for_every_adapter() -> None:
    assert {found.stem.split("-")[0] for found in CONFIGS} == {
        "datasets",
        "openspiel",
        "pettingzoo",
        "reasoning",
        "textarena",
    }
