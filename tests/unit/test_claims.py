"""Making the evidence: what is kept of a run, and series that can be interrupted. Runs here are made-up folders."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT, load_script

claims_file = load_script("benchmarks/claims_file.py")
claims = load_script("benchmarks/claims.py")

Trained = list[tuple[str, int, tuple[str, ...]]]


def write_run(folder: Path, seed: int, updates: int = 3) -> None:
    """A run folder as `coterie train` leaves it, as far as claims are concerned."""
    (folder / "results").mkdir(parents=True)
    lines = []
    for update in range(1, updates + 1):
        metrics = {"play/sender/accuracy": 0.1 * update + 0.00001, "play/sender/entropy": 1.0, "learn/x": 2.0}
        if update % 2 == 0:
            metrics |= {"exact/success": 0.25, "exact/other": 1.0, "exact/cooperation": 0.5}
        lines.append(json.dumps({"update": update, "seconds": {"total": 1.5, "learn": 1.0}, "metrics": metrics}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results" / "heldout.json").write_text(json.dumps({"tasks": 4, "mean": 1 / 3, "seed": seed}))
    versions = {"coterie": "9.9", "torch": "8.8", "transformers": "7.7", "python": "3.11.0"}
    (folder / "run.json").write_text(json.dumps({"seed": seed, "versions": versions}))
    (folder / "config.toml").write_text("[scenario.options]\n[rollout]\ntasks_per_update = 4\n")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Instead of training, folders are made up; gives what was asked for."""
    asked: Trained = []

    def train(config: Path, folder: Path, seed: int, changes: Sequence[str]) -> float:
        asked.append((config.name, seed, tuple(changes)))
        write_run(folder, seed)
        return 12.34

    monkeypatch.setattr(claims, "train", train)
    return asked


def runs(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return found


def test_what_is_kept_of_a_run(tmp_path: Path, trained: Trained) -> None:
    assert claims.main(["signaling", "--seeds", "5", "--results", str(tmp_path)]) == 0
    (run,) = runs(tmp_path / "signaling.json")
    assert (run["seed"], run["variant"], run["updates"], run["wall_seconds"]) == (5, "", 3, 12.3)
    assert run["training_seconds"] == 4.5
    assert run["heldout"] == {"tasks": 4, "mean": 0.333333, "seed": 5}
    assert run["curve"] == {
        "update": [1, 2, 3],
        "exact/success": [None, 0.25, None],
        "play/sender/accuracy": [0.1, 0.2, 0.3],
    }
    assert run["machine"]["coterie"] == "9.9"
    assert run["machine"]["cores"] >= 1
    assert run["machine"]["cpu"]


def test_the_file_is_small_and_lists_of_numbers_are_one_line_each(tmp_path: Path, trained: Trained) -> None:
    claims.main(["signaling", "--seeds", "0", "--results", str(tmp_path)])
    lines = [line.strip().rstrip(",") for line in (tmp_path / "signaling.json").read_text().splitlines()]
    assert '"update": [1, 2, 3]' in lines
    assert '"exact/success": [null, 0.25, null]' in lines


def test_an_interrupted_series_goes_on(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = claims.train

    def interrupted(config: Path, folder: Path, seed: int, changes: Sequence[str]) -> float:
        if seed == 1:
            raise KeyboardInterrupt
        time: float = whole(config, folder, seed, changes)
        return time

    monkeypatch.setattr(claims, "train", interrupted)
    assert claims.main(["signaling", "--results", str(tmp_path)]) == 130
    assert [run["seed"] for run in runs(tmp_path / "signaling.json")] == [0]
    monkeypatch.setattr(claims, "train", whole)
    assert claims.main(["signaling", "--results", str(tmp_path)]) == 0
    assert [seed for _, seed, _ in trained] == [0, 1, 2], "what was measured is not measured again"
    assert [run["seed"] for run in runs(tmp_path / "signaling.json")] == [0, 1, 2]
    assert claims.main(["signaling", "--again", "--seeds", "1", "--results", str(tmp_path)]) == 0
    assert [seed for _, seed, _ in trained] == [0, 1, 2, 1]
    assert [run["seed"] for run in runs(tmp_path / "signaling.json")] == [0, 1, 2], "a run replaces its like"


def test_the_dilemma_is_run_in_every_mode_and_at_every_level(tmp_path: Path, trained: Trained) -> None:
    arguments = ["matrix", "--seeds", "0", "--levels", "1", "0.5", "--results", str(tmp_path)]
    assert claims.main(arguments) == 0
    assert [changes for _, _, changes in trained] == [
        ("mode=cooperative",),
        ("mode=competitive",),
        ("mode=mixed", "scenario.options.cooperation_level=0.5"),
        ("mode=mixed", "scenario.options.cooperation_level=1.0"),
    ]
    found = {run["variant"]: run for run in runs(tmp_path / "prisoners_dilemma.json")}
    assert sorted(found) == ["competitive", "cooperative", "mixed 0.50", "mixed 1.00"]
    assert found["mixed 0.50"]["cooperation_level"] == 0.5
    assert found["mixed 0.50"]["curve"]["exact/cooperation"] == [None, 0.5, None]
    assert "cooperation_level" not in found["competitive"]
    claims.main([*arguments, "--modes", "competitive", "mixed"])
    assert len(trained) == 4


def test_run_folders_go_unless_kept(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    claims.main(["signaling", "--seeds", "0", "--results", str(tmp_path / "results")])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["results"]
    claims.main(["signaling", "--seeds", "1", "--keep", "--results", str(tmp_path / "results")])
    (kept,) = tmp_path.glob("coterie-signaling-*")
    assert (kept / "signaling-1" / "metrics.jsonl").is_file()
    assert str(kept) in capsys.readouterr().out


def test_results_of_another_config_are_never_mixed(tmp_path: Path, trained: Trained) -> None:
    claims.main(["signaling", "--seeds", "0", "1", "--results", str(tmp_path)])
    claims.main(["signaling", "--seeds", "0", "--results", str(tmp_path), "--set", "updates=2"])
    (run,) = runs(tmp_path / "signaling.json")
    assert run["seed"] == 0
    assert trained[-1] == ("signaling.toml", 0, ("updates=2",))


def test_changed_configs_stay_out_of_the_repositorys_results(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claims.main(["signaling", "--set", "updates=2"]) == 2
    assert "--results" in capsys.readouterr().err
    assert trained == []


def test_the_digest_is_of_what_a_config_says(tmp_path: Path) -> None:
    one, other, changed = (tmp_path / name for name in ("a.toml", "b.toml", "c.toml"))
    one.write_text("a = 1\nb = 2\n")
    other.write_text("# a comment\nb = 2\na = 1\n")
    changed.write_text("a = 1\nb = 3\n")
    assert claims_file.digest(one) == claims_file.digest(other)
    assert claims_file.digest(one) != claims_file.digest(changed)
    assert claims_file.digest(one) != claims_file.digest(one, ["a=2"])


@pytest.mark.parametrize(("missing", "said"), [("metrics.jsonl", "updates"), ("results/heldout.json", "evaluation")])
def test_a_run_without_figures_is_an_error(tmp_path: Path, missing: str, said: str) -> None:
    write_run(tmp_path / "run", 0)
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(claims.RunFailedError, match=said) as caught:
        claims.collect(tmp_path / "run", "signaling")
    assert missing in str(caught.value)


def test_a_damaged_file_of_results_is_an_error(
    tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "signaling.json").write_text('{"claim": "signaling"}')
    assert claims.main(["signaling", "--results", str(tmp_path)]) == 1
    assert "delete it" in capsys.readouterr().err
    assert trained == []


def test_a_failing_run_ends_the_series_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    assert claims.main(["signaling", "--seeds", "7", "8", "--results", str(tmp_path)]) == 1
    assert len(commands) == 1
    assert commands[0][-2:] == ["--seed", "7"]
    said = capsys.readouterr().err
    assert "exit code 2" in said
    assert "coterie train" in said


def test_task_types_repeat_after_a_whole_number_of_updates() -> None:
    def rounds(types: int | None, tasks: int) -> int:
        options = {} if types is None else {"types": ["reasoning"] * types}
        made: int = claims.updates_per_round({"scenario": {"options": options}, "rollout": {"tasks_per_update": tasks}})
        return made

    assert rounds(8, 4) == 2
    assert rounds(None, 5) == 1
    assert rounds(None, 4) == 5
    assert rounds(1, 3) == 1


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path, trained: Trained) -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        claims.main(["signaling", "--seeds", "0", "--results", str(tmp_path)])
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("claim", sorted(claims_file.CONFIGS))
def test_every_claim_is_of_a_shipped_config_that_trains_and_is_measured(claim: str) -> None:
    from coterie.config import load_config

    load: Callable[[Path], Any] = load_config
    config = load(ROOT / claims_file.CONFIGS[claim])
    assert config.models
    assert config.updates > 0
    assert config.evaluation.tasks > 0


def test_a_run_that_was_suspended_did_not_train_meanwhile() -> None:
    def records(*seconds: float) -> list[dict[str, dict[str, float]]]:
        return [{"seconds": {"total": each}} for each in seconds]

    assert claims.training_seconds(records(2.0, 3.0, 4.0, 14.9)) == 23.9
    assert claims.training_seconds(records(2.0, 3.0, 4.0, 3.0, 1800.0)) == 15.0
    assert claims.training_seconds([]) == 0.0
