"""A terminal that is closed under a run: it finishes its update and saves, or, where it was told to stay, goes on. A
server that stays can still be stopped in order."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tomli_w

from coterie.runs.directory import RunDirectory
from tests.support.terminal import AtTerminal


@pytest.mark.parametrize("stays", [False, True], ids=["as it comes", "nohup"])
def test_a_closed_terminal_costs_no_update(tiny_path: Path, tmp_path: Path, stays: bool) -> None:
    updates = 20 if stays else 100_000
    config = {
        "updates": updates,
        "mode": "competitive",
        "models": [{"model_id": "a"}, {"model_id": "b"}],
        "base": {"model": str(tiny_path), "threads": 1},
        "scenario": {"id": "matrix", "options": {"game": "matching_pennies", "rounds": 2}},
        "rollout": {"tasks_per_update": 10},
        "evaluation": {"tasks": 2},
        "run": {"checkpoint_every": 1000},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    with AtTerminal(
        ["train", str(tmp_path / "config.toml"), "--folder", str(tmp_path / "run")], stays=stays
    ) as terminal:
        terminal.until_shown("updates")  # the live table, after the first update
        terminal.close()
        code, said = terminal.end()
    assert "updates" in terminal.shown, (terminal.shown, said)
    run = RunDirectory.open(tmp_path / "run")
    assert (code, said) == ((0 if stays else 128 + signal.SIGHUP), "")
    assert run.checkpoints() == [run.updates_done()]
    assert (run.updates_done() == updates) is stays


def test_a_server_whose_terminal_is_gone_still_stops_in_order(tiny_path: Path) -> None:
    with AtTerminal(["serve", str(tiny_path), "--port", "0"], stays=True) as terminal:
        terminal.until_shown("/v1")
        terminal.close()
        terminal.process.send_signal(signal.SIGTERM)
        code, said = terminal.end()
    assert "/v1" in terminal.shown, (terminal.shown, said)
    assert (code, said) == (0, "")
