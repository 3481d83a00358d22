"""benchmarks/scenarios.py on the tiny base: who learns in which condition, what is kept, and going on after a stop."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.runs.directory import RunDirectory
from tests.support.scripts import load_script

claims = load_script("benchmarks/claims.py")
scenarios = load_script("benchmarks/scenarios.py")
steps = load_script("benchmarks/scenario_steps.py")


class Commands:
    """Runs what would be processes of their own here, and counts them."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, command: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        arguments = [str(part) for part in command]
        if arguments[1] == str(scenarios.STEPS):
            spec = Path(arguments[2])
            self.ran.append(spec.name.removesuffix(".spec.json"))
            steps.work(json.loads(spec.read_text()))
            code = 0
        else:
            self.ran.append("train")
            code = CliRunner().invoke(app, arguments[3:]).exit_code
        return subprocess.CompletedProcess(arguments, code)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(subprocess, "run", made.run)
    return made


def config(folder: Path, base: Path, **changes: Any) -> Path:
    path = folder / "code.toml"
    settings = {
        "name": "code",
        "updates": 2,
        # figures are compared to six digits, and conditions told apart by them: on every machine the same, and far
        # enough apart that no single sampled token decides
        "base": {"model": str(base), "threads": 1, "dtype": "float32"},
        "scenario": {"id": "signaling"},
        "models": [{"model_id": name, "learning_rate": 5e-3} for name in ("sender", "receiver")],
        "rollout": {"tasks_per_update": 4, "group_size": 4},
        "evaluation": {"tasks": 4},
        **changes,
    }
    path.write_text(tomli_w.dumps(settings))
    return path


def measure(path: Path, folder: Path, *more: str) -> int:
    arguments = [str(path), "--results", str(folder / "results"), "--work", str(folder / "work"), *more]
    return int(scenarios.main(arguments))


def test_all_conditions_of_two_seeds(tiny_path: Path, tmp_path: Path, commands: Commands) -> None:
    path = config(tmp_path, tiny_path)
    assert measure(path, tmp_path, "--seeds", "0", "1") == 0
    assert commands.ran == [
        "train", "train",
        "seed0-alone-sender", "seed0-alone-receiver", "seed0-apart", "seed0-others-0-1",
        "seed1-alone-sender", "seed1-alone-receiver", "seed1-apart", "seed1-others-1-0",
    ]  # fmt: skip
    found = json.loads((tmp_path / "results" / "code.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        assert list(run["conditions"]) == list(scenarios.CONDITIONS)
        assert run["tasks"] == 4
        assert all(0 < figures["exact"]["success"] < 1 for figures in run["conditions"].values())
    first = found["runs"][0]["conditions"]
    values = [first[key]["exact"]["success"] for key in ("together", "frozen", "apart", "others", "calibrated base")]
    assert len(set(values)) == 5
    # who learned alone has moved, its partner has not
    (work,) = (tmp_path / "work").iterdir()
    for learner, partner in (("sender", "receiver"), ("receiver", "sender")):
        run = RunDirectory.open(work / f"seed0-{learner}")
        state = json.loads((run.path / "checkpoints" / "000002" / "state.json").read_text())
        assert (state["models"][learner]["version"], state["models"][partner]["version"]) == (2, 0)
    # models put together again are the ones they were
    figures = scenarios.Series(path, work, (), ()).put_together(
        0, "same", dict.fromkeys(["sender", "receiver"], work / "seed0")
    )
    assert scenarios.kept(figures) == first["together"]
    # nothing is done twice
    commands.ran.clear()
    assert measure(path, tmp_path, "--seeds", "0", "1") == 0
    assert commands.ran == []


def test_the_last_quarter_is_of_the_training(tiny_path: Path, tmp_path: Path, commands: Commands) -> None:
    path = config(tmp_path, tiny_path, updates=5, evaluation={"tasks": 4, "every": 1})
    assert measure(path, tmp_path, "--seeds", "0", "--only", "together") == 0
    (run,) = json.loads((tmp_path / "results" / "code.json").read_text())["runs"]
    (work,) = (tmp_path / "work").iterdir()
    lines = (work / "seed0" / "metrics.jsonl").read_text().splitlines()
    recorded = [json.loads(line)["metrics"]["exact/success"] for line in lines]
    assert run["last_quarter"]["success"] == pytest.approx(sum(recorded[3:]) / 2, abs=1e-6)


def test_only_what_is_asked_for(tiny_path: Path, tmp_path: Path, commands: Commands) -> None:
    path = config(tmp_path, tiny_path)
    assert measure(path, tmp_path, "--seeds", "3", "--only", "together") == 0
    assert commands.ran == ["train"]
    (run,) = json.loads((tmp_path / "results" / "code.json").read_text())["runs"]
    assert list(run["conditions"]) == ["bare base", "calibrated base", "together"]


def test_variants(tiny_path: Path, tmp_path: Path, commands: Commands) -> None:
    path = config(tmp_path, tiny_path, updates=1)
    level = "scenario.options.reward_pool=2.0"
    mixed = ("--variant", "mixed half", "mode=mixed", level)
    assert (
        measure(path, tmp_path, "--seeds", "0", "--only", "together", *mixed, "--variant", "rival", "mode=competitive")
        == 0
    )
    assert commands.ran == ["train"] * 3
    found = json.loads((tmp_path / "results" / "code.json").read_text())
    assert [run["variant"] for run in found["runs"]] == ["", "mixed half", "rival"]
    assert found["runs"][1]["changes"] == ["mode=mixed", level]
    (work,) = (tmp_path / "work").iterdir()
    assert RunDirectory.open(work / "seed0").config.mode == "cooperative"
    assert RunDirectory.open(work / "seed0-rival").config.mode == "competitive"
    assert RunDirectory.open(work / "seed0-mixed-half").config.scenario.options["reward_pool"] == 2.0
    # one more of another seed, which is not trained as it is
    commands.ran.clear()
    assert measure(path, tmp_path, "--seeds", "1", "--only", "variants", "--variant", "late", "updates=2") == 0
    assert commands.ran == ["train"]
    found = json.loads((tmp_path / "results" / "code.json").read_text())
    assert sorted((run["seed"], run["variant"]) for run in found["runs"]) == [
        (0, ""), (0, "mixed half"), (0, "rival"), (1, "late"),
    ]  # fmt: skip


def test_teams_play_matches(tiny_path: Path, tmp_path: Path, commands: Commands) -> None:
    names = [f"{team}_{role}" for team in ("red", "blue") for role in ("speaker", "listener")]
    models = [{"model_id": name, "team_id": name.partition("_")[0], "role": "teammate"} for name in names]
    changes = {"scenario": {"id": "team_signaling"}, "mode": "team_battle", "models": models, "updates": 1}
    path = config(tmp_path, tiny_path, **changes, evaluation={"tasks": 1})
    assert measure(path, tmp_path, "--seeds", "0", "--only", "together") == 0
    assert commands.ran == ["train", "seed0-matches"]
    (run,) = json.loads((tmp_path / "results" / "code.json").read_text())["runs"]
    assert len(run["matches"]["partner of the other team"]) == 4
    assert all(sum(odds.values()) == pytest.approx(1, abs=1e-5) for kind in run["matches"].values() for odds in kind)


def test_results_of_another_state_of_the_config_are_replaced(
    tiny_path: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(config(tmp_path, tiny_path), tmp_path, "--seeds", "0", "--only", "together") == 0
    changed = config(tmp_path, tiny_path, updates=1)
    assert measure(changed, tmp_path, "--seeds", "1", "--only", "together") == 0
    assert "is of another state of code.toml: its 1 seeds are replaced" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "results" / "code.json").read_text())["runs"]
    assert (run["seed"], run["updates"]) == (1, 1)


def test_in_a_team_battle_teams_learn_together(tmp_path: Path) -> None:
    models = [{"model_id": f"{team}{n}", "team_id": team} for n in (1, 2) for team in ("red", "blue")]
    path = config(tmp_path, Path("nowhere"), mode="team_battle", models=models)
    groups = scenarios.Series(path, tmp_path, (), ()).groups()
    assert groups == [("red1", "red2"), ("blue1", "blue2")]
    alone = scenarios.Series(path, tmp_path, ("mode=competitive",), ()).groups()
    assert alone == [("red1",), ("blue1",), ("red2",), ("blue2",)]


def test_means_of_learners_take_each_from_its_own_run() -> None:
    def figures(left: float, right: float, exact: float, reach: float) -> dict[str, Any]:
        outcome = {"y": exact, "left_reach": reach, "blue_reach": 2 * reach, "redder_reach": reach}
        return {"mean": 0, "by_model": {"left": left, "right": right}, "exact": {"x": exact}, "outcome": outcome}

    alone = {("left",): figures(0.75, 0.1, 1.0, 0.5), ("right",): figures(0.2, 0.25, 2.0, 0.25)}
    assert scenarios.mean_of_learners(alone, {"left": "red", "right": "blue"}) == {
        "mean": 0.5,
        "by_model": {"left": 0.75, "right": 0.25},
        "exact": {"x": 1.5},
        "outcome": {"y": 1.5, "left_reach": 0.5, "blue_reach": 0.5, "redder_reach": 0.375},
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.toml"], "give the config to measure; nothing.toml is no file"),
        ([], "give the config to measure"),
        (["CONFIG", "--set", "updates=1"], "--set needs --results DIR"),
        (["CONFIG", "--variant", "rival"], "--variant rival: give a name of words, then at least one KEY=VALUE"),
        (["CONFIG", "--variant", "mode=competitive", "seed=1"], "--variant mode=competitive: give a name of words"),
        (["CONFIG", "--only", "variants"], "--only variants: give --variant too"),
    ],
)
def test_mistakes(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, tmp_path)
    assert scenarios.main([str(path) if part == "CONFIG" else part for part in arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_training_that_fails_is_told(tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(config(tmp_path, tmp_path / "no base"), tmp_path) == 1
    assert "ended with exit code 3; what it said stands above" in capsys.readouterr().err
