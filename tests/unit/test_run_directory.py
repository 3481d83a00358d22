"""A run's folder: never two runs in one, never two writers, and nothing half-written ever counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.config import RunConfig, load_config, parse_config
from coterie.errors import ConfigError, RunFolderError
from coterie.runs.checkpoint import Checkpoint, save_checkpoint
from coterie.runs.directory import FORMAT, RunDirectory, command, default_folder, resume_command, toml_text
from coterie.runs.sinks import MetricsFile, json_text, write_atomically
from coterie.types import AdapterVersion
from tests.support.disk import no_file_above


@dataclass(frozen=True)
class Figures:
    update: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def config() -> RunConfig:
    return parse_config(
        {"name": "first", "preset": "team_battle_models", "mode": "team_battle", "seed": 7, "updates": 9}
    )


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", config)


# -- create and open ----------------------------------------------------------------------------------------------


def test_created_run_opens_with_an_equal_config(run: RunDirectory, config: RunConfig) -> None:
    opened = RunDirectory.open(run.path)
    assert opened.config == config
    assert opened.info == run.info
    info = json.loads((run.path / "run.json").read_text())
    assert (info["name"], info["seed"], info["format"]) == ("first", 7, FORMAT)
    assert info["versions"]["python"] == sys.version.split()[0]
    assert info["versions"]["coterie"]


def test_written_config_is_complete(run: RunDirectory) -> None:
    written = tomllib.loads((run.path / "config.toml").read_text())
    assert written["learner"]["max_grad_norm"] == 1.0  # a default that nobody set
    assert [m["model_id"] for m in written["models"]] == ["red_1", "red_2", "blue_1", "blue_2"]
    assert "preset" not in written


options = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=8), options, max_size=4),
    st.text(max_size=20),
    st.floats(0, 1, exclude_min=True),
    st.lists(st.sampled_from("abc"), unique=True, max_size=3),
)
def test_any_config_survives_toml(given_options: dict[str, object], name: str, share: float, ids: list[str]) -> None:
    config = parse_config(
        {
            "name": name,
            "scenario": {"options": given_options},
            "base": {"lora_layers": share},
            "models": [{"model_id": i, "specialization": name} for i in ids],
        }
    )
    assert parse_config(tomllib.loads(toml_text(config))) == config


def test_none_inside_options_is_refused_by_name(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"scenario": {"options": {"a": {"b": None}}}})
    with pytest.raises(ConfigError, match=r"scenario\.options\.a\.b: None"):
        RunDirectory.create(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_with_what_it_holds(run: RunDirectory, config: RunConfig) -> None:
    MetricsFile(run.metrics_path).append(Figures(1))
    MetricsFile(run.metrics_path).append(Figures(2))
    run.checkpoint_dir(1).mkdir()
    run.complete_checkpoint(1)
    with pytest.raises(RunFolderError) as caught:
        RunDirectory.create(run.path, config)
    message = str(caught.value)
    assert "the run 'first'" in message
    assert "2 of 9 updates done, the last checkpoint after update 1" in message
    assert f"coterie train --resume {run.path}" in message
    assert "--folder" in message


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"not empty \(it holds 'thesis.txt'\)"):
        RunDirectory.create(tmp_path, config)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_existing_empty_folder_will_do(tmp_path: Path, config: RunConfig) -> None:
    assert RunDirectory.create(tmp_path, config).path == tmp_path


def test_a_file_or_an_unwritable_place_is_refused(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunDirectory.create(tmp_path / "file", config)
    with pytest.raises(RunFolderError, match="cannot make folder"):
        RunDirectory.create(tmp_path / "file" / "inside", config)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"holds no run\.json"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', "\xff"])
def test_open_refuses_a_damaged_run(run: RunDirectory, text: str) -> None:
    (run.path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunFolderError, match="damaged"):
        RunDirectory.open(run.path)


def test_open_refuses_a_newer_format(run: RunDirectory) -> None:
    (run.path / "run.json").write_text(json.dumps({**run.info, "format": FORMAT + 1}))
    with pytest.raises(RunFolderError, match="upgrade Coterie"):
        RunDirectory.open(run.path)


def test_open_names_the_mistake_in_an_edited_config(run: RunDirectory) -> None:
    file = run.path / "config.toml"
    file.write_text(file.read_text().replace("max_models", "max_model"))
    with pytest.raises(ConfigError, match=r"config\.toml.*did you mean 'max_models'"):
        RunDirectory.open(run.path)


def test_default_folder_is_safe_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"name": "../../a b/协同"})
    now = datetime(2024, 5, 6, 7, 8, 9)
    first = default_folder(config, now)
    assert first == Path("runs/a-b-协同-20240506-070809")
    first.mkdir(parents=True)
    assert default_folder(config, now) == Path("runs/a-b-协同-20240506-070809-2")


def test_commands_can_be_pasted() -> None:
    assert resume_command(Path("my runs/a'b")) == """coterie train --resume 'my runs/a'"'"'b'"""
    assert command("eval", Path("runs/a")) == "coterie eval runs/a"


# -- what is inside -----------------------------------------------------------------------------------------------


def test_only_complete_checkpoints_count(run: RunDirectory) -> None:
    assert run.latest_checkpoint() is None
    for update in (2, 10, 11):
        run.checkpoint_dir(update).mkdir()
    (run.path / "checkpoints" / "notes").mkdir()
    assert run.latest_checkpoint() is None
    run.complete_checkpoint(10)
    run.complete_checkpoint(2)
    assert run.latest_checkpoint() == run.path / "checkpoints" / "000010"
    assert run.checkpoints() == [2, 10]


def test_checkpoints_sort_by_number(run: RunDirectory) -> None:
    for update in (999_999, 1_000_000):
        run.checkpoint_dir(update).mkdir()
        run.complete_checkpoint(update)
    assert run.latest_checkpoint() == run.checkpoint_dir(1_000_000)


def test_adapter_versions_have_their_own_places(run: RunDirectory) -> None:
    folder = run.adapter_dir(AdapterVersion("red_1", 12))
    assert folder == run.path / "adapters" / "red_1" / "v12"
    assert folder.parent.is_dir()
    assert not folder.exists()


def test_results_are_replaced_whole_and_standard_json(run: RunDirectory) -> None:
    run.write_results("final", {"accuracy": 0.5})
    run.write_results("final", {"accuracy": float("nan"), "by": {"a": (1, 2)}})
    assert json.loads((run.path / "results" / "final.json").read_text()) == {"accuracy": None, "by": {"a": [1, 2]}}
    assert [p.name for p in (run.path / "results").iterdir()] == ["final.json"]
    with pytest.raises(ValueError, match="results name"):
        run.write_results("../escape", {})


def test_an_unused_run_can_be_taken_back(run: RunDirectory, config: RunConfig) -> None:
    (run.path / "mine.txt").write_text("keep")
    run.discard_unused()
    assert [p.name for p in run.path.iterdir()] == ["mine.txt"]


def test_a_used_run_is_never_taken_back(run: RunDirectory) -> None:
    MetricsFile(run.metrics_path).append(Figures(1))
    run.discard_unused()
    assert RunDirectory.open(run.path).updates_done() == 1


# -- the lock -----------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from coterie.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_excludes_this_process_too(run: RunDirectory) -> None:
    with run.lock():
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"), run.lock():
            pytest.fail("two holders")
        assert (run.path / "lock").exists()
    assert not (run.path / "lock").exists()
    with run.lock():
        pass


def test_a_live_process_keeps_its_lock_and_a_killed_one_loses_it(run: RunDirectory) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"process {holder.pid} "), run.lock():
            pytest.fail("two holders")
        holder.kill()
        holder.wait()
        assert (run.path / "lock").exists()
        with run.lock():
            assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()
    assert not list(run.path.glob("lock*"))


def test_a_reused_process_id_does_not_keep_a_lock(run: RunDirectory) -> None:
    with run.lock():
        owner = json.loads((run.path / "lock").read_text())
    if owner["born"] is None:
        pytest.skip("this system does not say when a process was born")
    (run.path / "lock").write_text(json.dumps({**owner, "born": str(int(owner["born"]) - 1)}))
    with run.lock():
        pass


def test_a_lock_of_another_machine_is_respected(run: RunDirectory) -> None:
    (run.path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "born": None}))
    with pytest.raises(RunFolderError, match=r"on elsewhere; .* delete .*lock"), run.lock():
        pytest.fail("taken over")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_an_unreadable_lock_is_respected(run: RunDirectory, text: str) -> None:
    (run.path / "lock").write_text(text)
    with pytest.raises(RunFolderError, match="unknown process"), run.lock():
        pytest.fail("taken over")
    assert not (run.path / "lock.takeover").exists()


def test_one_at_a_time_takes_a_dead_lock_over(run: RunDirectory) -> None:
    (run.path / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere", "born": None}))
    (run.path / "lock.takeover").write_text("")
    with pytest.raises(RunFolderError, match="taken over by another process"), run.lock():
        pytest.fail("two take it over")


def test_the_lock_is_let_go_on_errors(run: RunDirectory) -> None:
    def fail() -> None:
        with run.lock():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not (run.path / "lock").exists()


# -- metrics.jsonl ------------------------------------------------------------------------------------------------


def test_metrics_lines_come_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert MetricsFile.read(file.path) == []
    file.append(Figures(1, {"a/b": 0.5, "c/d": float("inf")}, {"total": 1.5}))
    file.append(Figures(2))
    assert MetricsFile.read(file.path) == [
        {"update": 1, "seconds": {"total": 1.5}, "metrics": {"a/b": 0.5, "c/d": None}},
        {"update": 2, "seconds": {}, "metrics": {}},
    ]


@given(st.integers(0, 200))
def test_a_process_dying_at_any_byte_costs_one_line(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = MetricsFile(tmp_path_factory.mktemp("metrics") / "metrics.jsonl")
    for update in (1, 2, 3):
        file.append(Figures(update, {"a": 1.0}))
    whole = file.path.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    file.path.write_bytes(kept)
    survivors = list(range(1, kept.count(b"\n") + 1))
    assert [e["update"] for e in MetricsFile.read(file.path)] == survivors
    file.append(Figures(9))
    assert [e["update"] for e in MetricsFile.read(file.path)] == [*survivors, 9]


def test_truncation_keeps_up_to_the_checkpoint(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(3)  # nothing there yet
    for update in (1, 2, 3, 4):
        file.append(Figures(update, {"loss": 0.1 * update}))
    first_two = b"".join(file.path.read_bytes().splitlines(keepends=True)[:2])
    with file.path.open("ab") as torn:
        torn.write(b'{"update": 5, "sec')
    file.truncate_after(2)
    assert file.path.read_bytes() == first_two
    file.truncate_after(0)
    assert MetricsFile.read(file.path) == []


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"metrics": {}}', b"\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n' + bad + b'\n{"update": 3}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        MetricsFile.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_fills_at_a_checkpoints_last_files_leaves_no_part_of_it(run: RunDirectory) -> None:
    save_checkpoint(run, Checkpoint(1, {"weights": torch.ones(2)}, {}))
    state = {"words": "a" * 2000}
    with no_file_above(1000), pytest.raises(RunFolderError, match=r"cannot write .*state\.json: .*; make room"):
        save_checkpoint(run, Checkpoint(2, {"weights": torch.ones(2)}, state))
    assert run.checkpoints() == [1]
    assert not run.checkpoint_dir(2).exists()
    save_checkpoint(run, Checkpoint(2, {"weights": torch.ones(2)}, state))
    assert run.checkpoints() == [1, 2]


def test_json_text_has_no_words_json_lacks() -> None:
    assert json.loads(json_text({"a": [float("nan"), -float("inf"), 1.0], "b": {3, 1}})) == {
        "a": [None, None, 1.0],
        "b": [1, 3],
    }


def test_config_file_of_a_run_is_what_train_reads(run: RunDirectory) -> None:
    assert load_config(run.path / "config.toml", ["updates=3"]).updates == 3
