"""What README and docs/serving.md show of asking a server, run as it stands there, against `coterie serve`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.external.processes import Launch, ServerProcess
from tests.support.scripts import ROOT

pytestmark = [pytest.mark.camel, pytest.mark.openai]

PAGES = ("README.md", "README.zh-CN.md", "docs/serving.md")
SHOWN = "http://localhost:8000"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def asking(page: str, language: str) -> list[str]:
    """Blocks that ask a server."""
    return [block for block in blocks(page, language) if SHOWN in block]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that was started by the README's own command, at a free port."""
    (command,) = [block for block in blocks("README.md", "sh") if re.fullmatch(r"coterie serve \S+ .*\n", block)]
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs").mkdir()
    program = [sys.executable, "-c", "from coterie.cli.main import main; main()", *shlex.split(command)[1:]]
    launch = Launch(lambda port: (*program, "--port", str(port)), {"OMP_NUM_THREADS": "1"})
    server = ServerProcess("readme", launch, folder)
    server.start()
    try:
        server.wait_until_up()
        yield server.url.removesuffix("/v1")
    finally:
        server.kill()


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("page", PAGES)
def test_python_as_it_is_shown(page: str, address: str, tmp_path: Path) -> None:
    found = asking(page, "python")
    assert sum("openai" in block for block in found) == 1
    assert sum("ModelFactory.create(ModelPlatformType.VLLM" in block for block in found) == 1
    for block in found:
        said = run([sys.executable, "-c", block.replace(SHOWN, address)], tmp_path)
        if "VLLMClient" in block:
            assert said.startswith("camel "), said
        elif "structured_outputs" in block:
            assert re.match(r"(cooperate|defect) \[\d+.*\] \[-?[\d.]+", said), said
        elif "ChatAgent" in block:
            assert re.search(r"\(\d+, .*\) \(\d+.*\) \(-?[\d.]+", said), said
        assert len(said) > 2


@pytest.mark.parametrize("page", PAGES[:2])
def test_curl_as_it_is_shown(page: str, address: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (block,) = asking(page, "bash")
    assert '"content"' in run(["bash", "-c", block.replace(SHOWN, address)], tmp_path)
