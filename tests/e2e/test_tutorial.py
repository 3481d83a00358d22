"""docs/tutorial.md, followed to the letter: every file written, every command run, every output seen.

The base is the tiny random model and trainings are short; nothing else differs from what a reader types.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.scripts import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    file: str | None


def blocks(text: str) -> list[Block]:
    return [Block(found["kind"], found["text"], found["file"]) for found in _BLOCK.finditer(text)]


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def shell(tmp_path: Path, tiny_path: Path) -> dict[str, str]:
    """An environment whose coterie, python and pip are those of this test, and whose trainings are short."""
    tools, site = tmp_path / "bin", tmp_path / "site"
    tools.mkdir()
    python = f"'{sys.executable}'"
    command = f"exec {python} -c \"import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()\""
    short = f"--set updates=2 --set rollout.group_size=4 --set 'base.model={tiny_path}'"
    script(tools / "coterie", f'if [ "$1" = train ]; then\n  {command} "$@" {short}\nfi\n{command} "$@"\n')
    script(tools / "python", f'exec {python} "$@"\n')
    # the reader's `pip install -e .` changes an environment; this one only a folder that is on the path
    offline = "--no-build-isolation --no-deps --no-index --disable-pip-version-check"
    script(
        tools / "pip",
        f"[ \"$*\" = 'install -e .' ] || exit 9\nexec {python} -m pip install -q {offline} --target '{site}' .\n",
    )
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(site)]),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_every_file_and_command_of_the_tutorial(shell: dict[str, str], tmp_path: Path) -> None:
    folder, output, ran = tmp_path / "work", "", []
    folder.mkdir()
    for block in blocks(TUTORIAL.read_text(encoding="utf-8")):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.kind == "sh":
            output = ""
            for line in block.text.splitlines():
                command, _, comment = line.partition("    # ")
                if command.startswith("cd "):
                    folder = folder / command.removeprefix("cd ").strip()
                    continue
                done = subprocess.run(
                    command, shell=True, cwd=folder, env=shell, capture_output=True, text=True, timeout=200, check=False
                )
                assert (done.returncode != 0) == (comment == "fails"), f"{line}\n{done.stdout}{done.stderr}"
                output += done.stdout
                ran.append(command.strip())
        elif block.kind == "text":
            for line in block.text.splitlines():
                assert line in output
        else:
            raise AssertionError(f"a block of {block.kind!r} that is no file: {block.text[:50]!r}")
    assert [command.split()[:2] for command in ran if command.startswith("coterie")] == [
        ["coterie", verb] for verb in ("init", "check", "check", "check", "train", "eval", "check")
    ]
    assert "coterie play run" in " ".join(ran)
    assert (folder / "run" / "results" / "heldout.json").is_file()


def test_every_block_is_looked_at() -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    assert len(blocks(text)) == len(re.findall(r"^```\w+$", text, re.MULTILINE))
