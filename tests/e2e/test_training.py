"""The whole path a user takes, on the tiny base: config, training, folder, resume, evaluation, play, and mistakes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.config import load_config, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.lm.tiny import tiny_random
from coterie.monitor.console import Silent
from coterie.monitor.metrics import UpdateRecord, describe
from coterie.runs.directory import RunDirectory
from coterie.runs.store import Store
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

PAIR = [{"model_id": "a", "lora_rank": 4, "learning_rate": 1e-3}, {"model_id": "b"}]
SMALL = {
    "updates": 4,
    "rollout": {"tasks_per_update": 5, "group_size": 3, "withhold": 0.4},
    "engine": {"calibration_tasks": 10},
    "evaluation": {"tasks": 5},
    "run": {"episodes_kept": 6, "checkpoint_every": 3},
}


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if both else value
    return out


@pytest.fixture(scope="module")
def settings(tiny_path: Path) -> Callable[..., dict[str, Any]]:
    """A small run on the tiny base; arguments are tables laid over it."""

    def make(*tables: Mapping[str, Any]) -> dict[str, Any]:
        return merged(SMALL, {"base": {"model": str(tiny_path), "threads": 1}}, *tables)

    return make


def coterie(*arguments: object, text: str | None = None) -> Any:
    """The command, in this process; the tests of the command line have it in its own."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


class StopAfter(Silent):
    """Asks for the end after an update, as Ctrl-C does."""

    def __init__(self, update: int | None) -> None:
        self.last = update
        self.env: MultiModelEnvironment | None = None

    def update(self, record: UpdateRecord) -> None:
        if record.update == self.last and self.env is not None:
            self.env.request_stop()


def train(settings: Mapping[str, Any], path: Path, stop_after: int | None = None) -> RunDirectory:
    config = parse_config(settings)
    run = RunDirectory.create(path, config)
    observer = StopAfter(stop_after)
    observer.env = env = MultiModelEnvironment.from_config(config, run_dir=run, observer=observer)
    summary = asyncio.run(env.train())
    assert summary.completed is (stop_after is None)
    asyncio.run(env.aclose())
    return run


def resume(path: Path) -> None:
    env = MultiModelEnvironment.resume(RunDirectory.open(path))
    assert asyncio.run(env.train()).completed
    asyncio.run(env.aclose())


def metrics(path: Path) -> list[str]:
    """The metrics line by line, wall times left out."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if key != "seconds"}) for line in lines]


def weights(path: Path, update: int = 4) -> dict[str, bytes]:
    """Every file of learned numbers: the last checkpoint and all adapter versions it knows."""
    state = json.loads((path / "checkpoints" / f"{update:06d}" / "state.json").read_text())
    files = {path / "checkpoints" / f"{update:06d}" / name for name in ("learner.safetensors", "state.json")}
    files |= {
        path / "adapters" / model / f"v{counters['version']}" / "adapter_model.safetensors"
        for model, counters in state["models"].items()
    }
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(files)}


# -- one run, looked at from all sides ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cooperative team trained on all five types of task by the command, in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "team.toml").write_text(tomli_w.dumps(settings({"name": "team", "preset": "cooperative_team"})))
    code = "import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()"
    command = [sys.executable, "-c", code, "train", "team.toml", "--folder", "run", "--seed", "3"]
    # another hash seed than this process: no order of a set may decide anything
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "calibrated" in done.stdout
    assert "update 4/4" in done.stdout
    assert "Held-out accuracy on 5 tasks" in done.stdout
    assert "run: run\n" in done.stdout
    return folder / "run"


def test_the_run_folder_holds_everything(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} >= {
        "config.toml", "run.json", "metrics.jsonl", "episodes.sqlite", "adapters", "checkpoints", "results",
    }  # fmt: skip
    assert not (finished / "lock").exists()
    config = load_config(finished / "config.toml")
    assert (config.name, config.seed, config.updates) == ("team", 3, 4)
    assert [model.model_id for model in config.models] == ["leader", "follower_1", "follower_2"]
    run = RunDirectory.open(finished)
    assert run.checkpoints() == [3, 4]
    with Store(run.database_path) as store:
        updates = store.updates()
        assert [(row["update"], row["played"], row["kept"], row["failed"]) for row in updates] == [
            (number, 15, 6, 0) for number in (1, 2, 3, 4)
        ]
        calls = store.calls(update=4)
        assert {call["tier"] for call in calls} == {"local"}
        assert {call["model_id"] for call in calls} == {"leader", "follower_1", "follower_2"}
        assert {call["adapter"] for call in calls if call["model_id"] == "leader"} == {"leader@v3"}
    for model in ("leader", "follower_1", "follower_2"):
        assert {path.name for path in (finished / "adapters" / model).iterdir()} == {"v3", "v4"}


def test_every_metric_is_explained_and_every_type_was_trained(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    names = {name for line in lines for name in line["metrics"]}
    assert [name for name in names if describe(name) is None] == []
    assert names >= {f"accuracy/leader/{task_type}" for task_type in TaskType}
    assert names >= {f"learn/{model}/grad_norm" for model in ("leader", "follower_1", "follower_2")}
    assert all(line["metrics"]["learn/leader/grad_norm"] > 0 for line in lines)
    # what the learner computes is what the engine sampled from
    assert all(line["metrics"]["learn/leader/mismatch"] < 0.05 for line in lines)
    assert "play/leader/cooperation_score" in names
    assert "strategy/central" in names


def test_the_held_out_table_is_kept(finished: Path) -> None:
    results = json.loads((finished / "results" / "heldout.json").read_text())
    assert results["tasks"] == 5
    assert list(results["players"]) == ["bare base", "calibrated base", "trained"]
    for player in results["players"].values():
        assert set(player["by_task_type"]) == set(TaskType)
        assert set(player["by_model"]) == {"leader", "follower_1", "follower_2"}
        assert 0 <= player["mean"] <= 1


def test_the_same_config_and_seed_give_the_same_run(
    finished: Path, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    again = settings({"name": "team", "preset": "cooperative_team", "seed": 3})
    train(again, tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(finished)
    assert weights(tmp_path / "again") == weights(finished)
    # fewer updates are a part of more of them; another seed is another run
    other = merged(again, {"seed": 4, "updates": 1, "evaluation": {"tasks": 0}})
    train(other, tmp_path / "other")
    assert metrics(tmp_path / "other")[0] != metrics(finished)[0]


@pytest.mark.parametrize("model", ["leader", "follower_2"])
def test_a_saved_adapter_loads_in_peft(finished: Path, tiny_path: Path, model: str) -> None:
    directory = finished / "adapters" / model / "v4"
    plain = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    tokens = torch.tensor([list(range(5, 25))])
    with torch.no_grad():
        before = plain(tokens).logits
        after = PeftModel.from_pretrained(plain, directory)(tokens).logits
    assert (after - before).abs().max() > 1e-3
    # the adapter on disk is the one the checkpoint goes on with
    kept = load_file(finished / "checkpoints" / "000004" / "learner.safetensors")[f"{model}/weights"]
    saved = load_file(directory / "adapter_model.safetensors")
    assert kept.norm() == pytest.approx(float(torch.cat([t.flatten() for t in saved.values()]).norm()), rel=1e-6)


def test_a_second_run_in_the_folder_is_refused(finished: Path) -> None:
    before = metrics(finished)
    result = coterie("train", finished / "config.toml", "--folder", finished)
    assert result.exit_code == 5
    assert "already holds the run 'team' (4 of 4 updates done, the last checkpoint after update 4)" in result.stderr
    assert metrics(finished) == before


def test_eval_measures_a_finished_run(finished: Path) -> None:
    result = coterie("eval", finished, "--tasks", 5)
    assert result.exit_code == 0, result.output
    for heading in ("bare base", "calibrated base", "trained", "gain", *TaskType):
        assert heading in result.stdout
    assert (finished / "results" / "eval.json").exists()
    # the same tasks, the same policies: what the training itself found
    heldout = json.loads((finished / "results" / "heldout.json").read_text())["players"]["trained"]
    assert f"{heldout['mean']:.3f}" in result.stdout


def test_a_person_plays_with_a_finished_run(finished: Path) -> None:
    result = coterie("play", finished, "--task", 5, "--seat", "seat_3", text="1\n" * 4)
    assert result.exit_code == 0, result.output
    assert "your turn at seat seat_3" in result.stdout
    assert "You follow a leader. Team: team. Good at quick answers." in result.stdout
    assert "seat_1 (leader@v4), decision:" in result.stdout
    assert "seat_3 (you), answer:" in result.stdout
    assert "reward" in result.stdout
    result = coterie("play", finished, "--seat", "seat_9", text="1\n")
    assert result.exit_code == 2
    assert "there is no seat 'seat_9'; seats: seat_1, seat_2, seat_3" in result.stderr
    result = coterie("play", finished, "--task", 100000, text="1\n")
    assert result.exit_code == 2
    assert "no held-out task number 100000" in result.stderr


def test_a_finished_run_has_nothing_left_to_do(finished: Path) -> None:
    before = metrics(finished), weights(finished)
    result = coterie("train", "--resume", finished)
    assert result.exit_code == 0, result.output
    assert (metrics(finished), weights(finished)) == before


# -- stopped and resumed ------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n} + {n} =", "answer": str(2 * n), "max_tokens": 4} for n in range(20)]
    lines += [{"prompt": f"Is {n} odd?", "choices": ["yes", "no"], "answer": "no"} for n in range(0, 20, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


MIXED = {
    "mode": "mixed",
    "scenario": {"options": {"models": 4, "cooperation_level": 0.6}},
    "models": [
        {"model_id": "leader", "role": "leader", "team_id": "one"},
        {"model_id": "follower", "role": "follower", "team_id": "one"},
        {"model_id": "rival", "role": "competitor"},
        {"model_id": "watcher", "role": "neutral"},
        {"model_id": "substitute", "role": "teammate", "team_id": "one"},
    ],
}
SOCIETIES: dict[str, Mapping[str, Any]] = {
    "cooperative": {"preset": "cooperative_team", "rollout": {"language": "zh"}},
    "competitive": {"mode": "competitive", "preset": "competitive_models"},
    "team battle": {
        "mode": "team_battle",
        "preset": "team_battle_models",
        "scenario": {"options": {"models": 4}},
    },
    "mixed, more models than seats": MIXED,
    "signaling, measured exactly": {
        "scenario": {"id": "signaling"},
        "models": PAIR,
        "credit": {"scheme": "moving_average"},
        "learner": {"entropy_bonus": 0.05, "warmup_updates": 2, "final_learning_rate": 0.2},
        "evaluation": {"every": 1},
    },
    "matrix, rotating, clipped": {
        "scenario": {"id": "matrix", "options": {"rounds": 3}},
        "mode": "competitive",
        "models": PAIR,
        "rollout": {"rotate_seats": True, "tasks_per_update": 1, "group_size": 8},
        "learner": {"loss": "clipped", "passes": 2, "kl_coefficient": 0.1},
        "evaluation": {"every": 2},
    },
    "matrix, held by magnets": {
        "scenario": {"id": "matrix", "options": {"game": "rock_paper_scissors", "rounds": 2}},
        "mode": "competitive",
        "models": PAIR,
        "credit": {"scheme": "magnetic", "options": {"magnet": 0.1, "every": 1, "rate": 0.5, "proximal": 0.2}},
        "rollout": {"tasks_per_update": 1, "group_size": 32},
        "learner": {"passes": 2},
        "evaluation": {"every": 1},
    },
    "jsonl": {"scenario": {"id": "jsonl"}, "models": PAIR, "rollout": {"withhold": 0.0}},
}


@pytest.mark.parametrize("society", SOCIETIES)
def test_stopped_and_resumed_is_the_run_that_never_stopped(
    society: str, settings: Callable[..., dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    chosen = settings({"updates": 3, "evaluation": {"tasks": 1}}, SOCIETIES[society])
    if society == "jsonl":
        chosen = merged(chosen, {"scenario": {"options": {"path": str(rows), "required_models": 2}}})
    train(chosen, tmp_path / "whole")
    train(chosen, tmp_path / "halves", stop_after=2)
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")[:2]
    resume(tmp_path / "halves")
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "halves", 3) == weights(tmp_path / "whole", 3)
    results = [(tmp_path / run / "results" / "heldout.json").read_text() for run in ("whole", "halves")]
    assert results[0] == results[1]
    with Store(tmp_path / "halves" / "episodes.sqlite") as halves, Store(tmp_path / "whole" / "episodes.sqlite") as one:
        assert halves.episodes(limit=1000) == one.episodes(limit=1000)
    # something was learned, so there was something to get wrong
    state = json.loads((tmp_path / "whole" / "checkpoints" / "000003" / "state.json").read_text())
    assert all(counters["weight_updates"] > 0 for counters in state["models"].values())


def test_a_killed_run_is_done_again_from_its_checkpoint(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Killed after update 4 but before its checkpoint: what lies past update 3 is forgotten and done again."""
    chosen = settings({"models": PAIR, "scenario": {"id": "signaling"}, "evaluation": {"tasks": 0}})
    run = train(chosen, tmp_path / "run")
    before = metrics(run.path), weights(run.path)
    (run.checkpoint_dir(4) / "complete").unlink()
    with run.metrics_path.open("a") as file:
        file.write('{"update": 5, "met')  # a line it was in the middle of
    resume(run.path)
    assert (metrics(run.path), weights(run.path)) == before


# -- a scenario that fails ----------------------------------------------------------------------------------------


class Fragile:
    """Every third training task cannot be played; from the seventh on, none can."""

    Options = ScenarioOptions

    def __init__(self, options: ScenarioOptions) -> None: ...

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        number = 0
        while split is Split.TRAIN or number < 3:
            broken = split is Split.TRAIN and (number % 3 == 2 or number >= 6)
            content = {"broken": broken, "n": number}
            yield TrainingTask(f"{split}-{number}", TaskType.REASONING, content=content, split=split)
            number += 1

    def seats(self, task: TrainingTask) -> list[Seat]:
        return [Seat("only")]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        if task.content["broken"]:
            raise KeyError("piece")
        turn = await table["only"].act(Observation(user="Say yes."), choices=("yes", "no"))
        return Outcome({"only": float(turn.choice == 0)})


FRAGILE = {
    "scenario": {"id": "tests.e2e.test_training:Fragile"},
    "models": [{"model_id": "a"}],
    "rollout": {"tasks_per_update": 3, "group_size": 4},
}


def test_failures_are_kept_and_too_many_end_the_run(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "fragile.toml"
    config.write_text(tomli_w.dumps(settings(FRAGILE)))
    result = coterie("train", config, "--folder", tmp_path / "run", "--set", "rollout.max_failed_share=0.4")
    assert result.exit_code == 7
    assert "update 3: 12 of 12 episodes failed, more than rollout.max_failed_share (0.4)" in result.stderr
    assert "12 times: KeyError: 'piece'" in result.stderr
    run = RunDirectory.open(tmp_path / "run")
    # the first two updates had four failures each and went on; they are saved
    assert run.updates_done() == 2
    assert run.checkpoints() == [2]
    assert [json.loads(line)["metrics"]["episodes/failed_share"] for line in metrics(run.path)] == [1 / 3, 1 / 3]
    with Store(run.database_path) as store:
        failures = store.failures(limit=100)
    assert [row["update"] for row in failures] == [1] * 4 + [2] * 4 + [3] * 12
    assert failures[0]["task_id"] == "train-2"
    line = Fragile.play.__code__.co_firstlineno + 2
    assert failures[0]["error"] == f"KeyError: 'piece' (test_training.py:{line} in play)"


def test_failures_within_the_share_are_left_out_of_training(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run = train(settings(FRAGILE, {"rollout": {"max_failed_share": 1.0}}), tmp_path / "run")
    lines = [json.loads(line)["metrics"] for line in metrics(run.path)]
    assert [line["episodes/played"] for line in lines] == [8, 8, 0, 0]
    learned = [line["learn/a/grad_norm"] > 0 for line in lines]
    assert learned[0]
    assert not any(learned[2:])
    state = json.loads((run.path / "checkpoints" / "000004" / "state.json").read_text())
    # nothing to learn from is no step and no version
    counters = ("version", "weight_updates", "lora_adaptations")
    assert [state["models"]["a"][name] for name in counters] == [sum(learned)] * 3


# -- mistakes -----------------------------------------------------------------------------------------------------

MODELS_TWICE = {"models": [{"model_id": "same"}, {"model_id": "same"}]}
MISTAKES: dict[str, tuple[Mapping[str, Any], int, str]] = {
    "unknown key": ({"rollout": {"groupsize": 4}}, 2, "unknown key 'rollout.groupsize' (did you mean 'group_size'?)"),
    "unknown key of a model": (
        {"models": [{"model_id": "a", "learning_rat": 1}]},
        2,
        "unknown key 'models.0.learning_rat' (did you mean 'learning_rate'?)",
    ),
    "impossible value": ({"learner": {"clip_low": 1.5}}, 2, "learner.clip_low: "),
    "impossible rate": ({"models": [{"model_id": "a", "learning_rate": -1.0}]}, 2, "models.0.learning_rate: "),
    "impossible id": ({"models": [{"model_id": "../a"}]}, 2, "models.0.model_id: must be 1 to 64 letters"),
    "impossible option": ({"scenario": {"options": {"difficulty": [0.9, 0.1]}}}, 2, "difficulty: "),
    "duplicate ids": (MODELS_TWICE, 2, "model_id 'same' is used 2 times"),
    "more than max_models": ({"max_models": 1, "models": PAIR}, 2, "2 models, but max_models is 1"),
    "fewer models than seats": ({"models": PAIR}, 2, "3 seats to fill, but there are 2 models; add 1 more"),
    "no teams in a battle": ({"mode": "team_battle", "models": PAIR}, 2, "needs a team_id for every model; 'a'"),
    "two bases": (
        {"models": [{"model_id": "a", "model_name": "x"}, {"model_id": "b", "model_name": "y"}]},
        2,
        "models name different bases (x, y)",
    ),
    "no such directory": ({"base": {"model": "./nowhere/base"}}, 3, "base model './nowhere/base': no such directory"),
    "no such name": ({"base": {"model": "smollm2"}}, 3, "(did you mean 'smollm2-135m-instruct'?)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_the_base_is_loaded(
    mistake: str,
    settings: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, code, said = MISTAKES[mistake]
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("the base was loaded")
    )
    models = {} if "models" in tables else {"preset": "cooperative_team"}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(settings(models, tables)))
    result = coterie("train", tmp_path / "config.toml", "--folder", tmp_path / "run")
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    # the mended config may use the same folder
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", [("eval",), ("play",), ("train", "--resume")])
def test_adapters_of_another_base_are_refused(
    verb: tuple[str, ...], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    chosen = settings({"models": PAIR, "scenario": {"id": "signaling"}, "updates": 1, "evaluation": {"tasks": 0}})
    run = train(chosen, tmp_path / "run")
    other = tiny_random(tmp_path / "other", seed=1)
    text = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(text.replace(str(chosen["base"]["model"]), str(other)))
    result = coterie(*verb, run.path, text="1\n")
    assert result.exit_code == 3
    assert f"was trained on another base model than {other}" in result.stderr
