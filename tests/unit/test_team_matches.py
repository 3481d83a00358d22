"""Matches of a trained run: who sits where, and figures from a run folder on the tiny model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.models import LoRAModel, ModelConfig
from coterie.runs.directory import RunDirectory
from tests.support.scripts import load_script

team_matches = load_script("benchmarks/team_matches.py")
KINDS = [
    "trained against trained", "trained against untrained", "partner of the other team", "untrained partner",
]  # fmt: skip


def config(tiny_path: Path, scenario: str) -> RunConfig:
    return parse_config(
        {
            "base": {"model": str(tiny_path), "threads": 1},
            "mode": "team_battle",
            "updates": 2,
            "scenario": {"id": scenario, "options": {}},
            "models": [
                {"model_id": f"{team}_{number}", "team_id": team, "role": "teammate", "learning_rate": 0.02}
                for team in ("red", "blue")
                for number in (1, 2)
            ],
            "rollout": {"tasks_per_update": 1, "group_size": 8},
            "engine": {"calibration_tasks": 4},
            "evaluation": {"tasks": 0},
        }
    )


def test_seatings() -> None:
    models = {f"{team}_{role}": LoRAModel(ModelConfig(model_id=f"{team}.{role}"), version=3)
              for team in ("red", "blue") for role in ("speaker", "listener")}  # fmt: skip
    found = team_matches.matches(models, "red")
    assert list(found) == KINDS
    rivals = {"blue.speaker": None, "blue.listener": None}
    assert found["trained against trained"] == [{}]
    assert found["trained against untrained"] == [rivals]
    swapped = [{key: str(value and value.name) for key, value in s.items()} for s in found["partner of the other team"]]
    assert swapped == [
        {**dict.fromkeys(rivals, "None"), "red.speaker": "blue.speaker@v3"},
        {**dict.fromkeys(rivals, "None"), "red.listener": "blue.listener@v3"},
    ]
    assert found["untrained partner"] == [{**rivals, "red.speaker": None}, {**rivals, "red.listener": None}]


def test_a_runs_teams_are_measured(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run", config(tiny_path, "team_signaling"))
    env = MultiModelEnvironment.from_config(run.config, run_dir=run)
    assert asyncio.run(env.train()).completed
    asyncio.run(env.aclose())
    assert team_matches.main([str(run.path), "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert list(table) == KINDS
    for kind, odds in table.items():
        assert kind in printed
        assert sum(odds[name]["mean"] for name in ("wins", "draws", "losses")) == pytest.approx(1)
        assert all(o["low"] <= o["mean"] <= o["high"] for o in odds.values())
    # both teams are looked at, so against each other wins and losses are the same
    even = table["trained against trained"]
    assert even["wins"]["mean"] == pytest.approx(even["losses"]["mean"])
    assert table["trained against untrained"] != table["untrained partner"]


def test_a_game_without_teams_is_refused(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tiny_path, "team_signaling").model_dump(mode="json")
    settings.update(
        mode="cooperative", scenario={"id": "matrix", "options": {}}, models=settings["models"][:2], updates=1
    )
    run = RunDirectory.create(tmp_path / "run", parse_config(settings))
    env = MultiModelEnvironment.from_config(run.config, run_dir=run)
    asyncio.run(env.train())
    asyncio.run(env.aclose())
    assert team_matches.main([str(run.path)]) == 7
    assert "two teams of trained models are needed, in seats" in capsys.readouterr().err
