"""This Python without some of its packages, as if they had never been installed: for processes, not for this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.support.scripts import ROOT

TORCH = ("torch", "torchgen", "functorch", "torchvision", "transformers", "accelerate", "peft")
MAIN = "from coterie.cli.main import main; main()"


def without(folder: Path, packages: Iterable[str] = TORCH) -> Path:
    """Fill `folder` with links to all that is installed here but `packages` and their metadata; returns it."""
    names = "|".join(map(re.escape, packages))
    left_out = re.compile(rf"({names})(-[^/]*\.(dist|egg)-info)?|.*\.pth|__editable__.*", re.IGNORECASE)
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not left_out.fullmatch(entry.name) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def environment(folder: Path, **more: str) -> Mapping[str, str]:
    """Of a process that sees only `folder` and Coterie's source (start it with `-S`, which leaves out the rest)."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(folder))),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def python(folder: Path, code: str, *arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `code` there."""
    return subprocess.run(
        command(code, *arguments), env=environment(folder, **more), cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def command(code: str, *arguments: object) -> Sequence[str]:
    """What to start."""
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]
