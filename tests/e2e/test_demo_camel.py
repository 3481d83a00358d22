"""The CAMEL demo runs whatever is missing, and says what it fell back to."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from coterie.inference.fake import FakeServer

DEMO = Path(__file__).parents[2] / "demo" / "camel_oasis_vllm_example.py"
NOBODY = "http://127.0.0.1:9"


def demo(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The demo as a newcomer starts it, with an empty cache of base models."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COTERIE_CACHE": str(folder / "cache")}
    command = [sys.executable, str(DEMO), "--turns", "1", "--max-tokens", "6", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def rows(text: str) -> dict[str, list[str]]:
    """Speaker -> the cells of its row in the last table."""
    table = text[text.rindex("speaker ") :].splitlines()
    found = {line.split()[0]: line.split()[1:] for line in table if line.startswith(("planner", "critic"))}
    assert found.keys() == {"planner", "critic"}
    return found


def test_without_a_server_the_engine_inside_speaks(tiny_path: Path, tmp_path: Path) -> None:
    done = demo(tmp_path, "--url", NOBODY, "--base", tiny_path)
    assert done.returncode == 0, done.stderr
    assert f"no server at {NOBODY}" in done.stdout
    assert "Fallen back to what this process can do by itself" in done.stdout
    assert "in use: local" in done.stdout
    for cells in rows(done.stdout).values():
        assert cells[0] == "local"
        assert int(cells[-2]) > 0
        assert float(cells[-1]) < 0
    assert "Traceback" not in done.stdout + done.stderr
    if find_spec("oasis") is None:
        assert "No OASIS campaign" in done.stdout
        assert "run `make oasis`" in done.stdout


def test_with_nothing_at_all_answers_are_simulated_and_say_so(tmp_path: Path) -> None:
    done = demo(tmp_path, "--url", NOBODY)
    assert done.returncode == 0, done.stderr
    assert "in use: simulated" in done.stdout
    assert done.stdout.count("[simulated]") == 2
    assert all(cells[0] == "simulated" and cells[-2:] == ["0", "-"] for cells in rows(done.stdout).values())
    assert "SIMULATED" in done.stderr


@pytest.mark.skipif(find_spec("camel") is not None, reason="with CAMEL the demo does more; see tests/external")
def test_with_a_server_and_without_camel_plain_http_speaks(tmp_path: Path) -> None:
    async def play() -> subprocess.CompletedProcess[str]:
        async with FakeServer(seed=1) as one, FakeServer(seed=1) as other:
            done = await asyncio.to_thread(demo, tmp_path, "--url", one.url, "--url", other.url)
            assert one.calls + other.calls >= 2
            return done

    done = asyncio.run(play())
    assert done.returncode == 0, done.stderr
    assert "CAMEL is not installed; pip install 'coterie[camel]'" in done.stdout
    assert "without CAMEL agents" in done.stdout
    assert "in use: http" in done.stdout
    assert all(cells[0] == "http" and int(cells[-2]) > 0 for cells in rows(done.stdout).values())


def test_a_mistake_is_told_in_a_line(tmp_path: Path) -> None:
    done = demo(tmp_path, "--url", "not a url")
    assert done.returncode in (0, 2)
    assert "write it as http://host:port" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
