"""`coterie check`: plain words, an exit code, JSON; and a play that nothing can interrupt ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coterie.cli.check import parse_options, prompt_tokens
from coterie.cli.main import app
from coterie.errors import ConfigError
from coterie.types import Observation
from tests.support.scripts import ROOT

FAULTY = """
from coterie.scenarios.matrix import Matrix
from coterie.types import Outcome

class Cheat(Matrix):
    async def play(self, task, table):
        outcome = await super().play(task, table)
        return Outcome({seat: 1.5 + score for seat, score in outcome.scores.items()})

class Spins(Matrix):
    async def play(self, task, table):
        while True:
            pass
"""


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_a_built_in_keeps_its_contract() -> None:
    done = invoke("matrix", "--options", "rounds=2", "--options", "game=stag_hunt", "--base", "nowhere/at-all")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("matrix: keeps its contract (2 tasks, ")
    assert any(line.startswith("note: training and held-out tasks share their content") for line in lines)
    assert any(line.startswith("note: whether prompts fit a base model was not looked at") for line in lines)


def test_problems_are_listed_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cheating.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    done = invoke("cheating:Cheat", "--plays", 0)
    assert done.exit_code == 1
    assert "1. the score of seat 'row' is outside 0..1" in done.stdout
    assert "   seen: task 'matrix-prisoners_dilemma', language en, nobody is heard, " in done.stdout
    assert "   mend: move what was won to 0..1 by the least and the most that can be won" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("cheating:Cheat: ")
    told = json.loads(invoke("cheating:Cheat", "--plays", 0, "--json").stdout)
    assert told["scenario"] == "cheating:Cheat"
    assert told["passed"] is False
    assert {"where", "what", "mend"} == set(told["problems"][0])


@pytest.mark.parametrize("as_json", [False, True])
def test_a_play_that_never_awaits_ends_the_check_and_is_located(as_json: bool, tmp_path: Path) -> None:
    (tmp_path / "spinning.py").write_text(FAULTY)
    code = (
        "from coterie.cli import check; from coterie.cli.main import main; "
        "watch = check.StuckWatch; check.StuckWatch = lambda patience, tell: watch(1.0, tell); main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, "check", "spinning:Spins", *(["--json"] if as_json else [])]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "a play loops without ever awaiting" in done.stdout
    assert "spinning.py:1" in done.stdout
    assert "in play" in done.stdout
    if as_json:
        assert json.loads(done.stdout)["passed"] is False


def test_options_are_toml_or_text() -> None:
    assert parse_options(["rounds=3", "game=stag_hunt", 'labels=["up", "down"]']) == {
        "rounds": 3, "game": "stag_hunt", "labels": ["up", "down"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--options 'rounds': write it as key=value, for example --options rounds=3"):
        parse_options(["rounds"])
    done = invoke("matrix", "--options", "round=3")
    assert done.exit_code == 2
    assert "unknown key 'round' (did you mean 'rounds'?)" in done.stderr
    done = invoke("matricks")
    assert done.exit_code == 2
    assert "unknown scenario 'matricks' (did you mean 'matrix'?)" in done.stderr


def test_prompts_are_counted_as_the_base_would(tiny_path: Path) -> None:
    tokens, context, note = prompt_tokens(str(tiny_path))
    assert tokens is not None
    assert (context, note) == (2048, "")
    from coterie.config import BaseConfig
    from coterie.lm.base import load_base

    chat = load_base(BaseConfig(model=str(tiny_path))).chat
    for seen in (
        Observation("Is it red?"), Observation("x" * 300, system="Yes or no.", prefix="Answer:"), Observation("一个"),
    ):  # fmt: skip
        exactly = len(chat.render(seen)) + 16
        assert exactly <= tokens(seen, None, 16) <= exactly + 48
    assert tokens(Observation("Is it red?"), ["yes", "no"], 16) < tokens(Observation("Is it red?"), None, 16)


def test_a_base_without_readable_files_is_noted(tmp_path: Path, tiny_path: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_path, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    tokens, _, note = prompt_tokens(str(broken))
    assert tokens is None
    assert "has no tokenizer.json or config.json to read" in note
