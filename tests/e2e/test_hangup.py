"""A terminal that is closed under a run: it finishes its update and saves, or, where it was told to stay, goes on."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from coterie.runs.directory import RunDirectory
from tests.support.served import MAIN


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
    command = [sys.executable, "-c", MAIN, "train", str(tmp_path / "config.toml"), "--folder", str(tmp_path / "run")]
    ours, theirs = pty.openpty()

    def at_the_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(1), os.O_RDWR))  # the first one a new session opens is its own
        signal.signal(signal.SIGHUP, signal.SIG_IGN if stays else signal.SIG_DFL)  # these tests may be under nohup

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, preexec_fn=at_the_terminal,
        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""
    try:
        while process.poll() is None and b"updates" not in shown:  # the live table, after the first update
            with contextlib.suppress(OSError):
                shown += os.read(ours, 65536)
            time.sleep(0.01)
        os.close(ours)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert b"updates" in shown, (shown, said)
    run = RunDirectory.open(tmp_path / "run")
    assert (process.returncode, said) == ((0 if stays else 128 + signal.SIGHUP), "")
    assert run.checkpoints() == [run.updates_done()]
    assert (run.updates_done() == updates) is stays
