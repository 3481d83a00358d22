"""Compile `kernels.cpp`, with the headers beside it, for this processor, once, and load it.

    source, compiler, options, processor -> digest -> <cache>/kernels/<digest>.so, made aside and renamed

A library in the cache is whole or absent. A C++ compiler that is missing or fails is no error: the reason is kept for
`coterie doctor`, and everything is computed by torch's operations. `COTERIE_KERNELS=0` wants it so.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from coterie.lm.catalog import cache_root

SOURCE = Path(__file__).with_name("kernels.cpp")
SWITCH = "COTERIE_KERNELS"
"""In the environment: 0 leaves the kernels out."""
SECONDS = 120
"""After which a compiler that is still at work is stopped."""

_ALWAYS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden",
           "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")  # fmt: skip
_OPTIONS = (("-march=native", "-mprefer-vector-width=512", "-fopenmp"), ("-march=native",), ())
"""Tried in order; without OpenMP the kernels use one thread."""


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled kernels, or why there are none."""

    path: Path | None
    problem: str = ""
    compiler: str = ""
    """What would make them, where they are not made yet."""


def compilers(environ: Mapping[str, str]) -> Iterator[str]:
    """C++ compilers that are here, the one $CXX names first."""
    for name in (environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is not None:
            yield found


def find(source: Path, cache: Path, environ: Mapping[str, str]) -> Library:
    """The library of `source` in `cache`, or the compiler that would make it; nothing is compiled."""
    if environ.get(SWITCH, "") == "0":
        return Library(None, f"{SWITCH}=0 leaves them out")
    if sys.platform == "win32":
        return Library(None, "they are made for Linux and macOS")
    found = list(dict.fromkeys(compilers(environ)))
    if not found:
        return Library(None, "no C++ compiler is here")
    made = (cache / f"{_digest(source, compiler)}.so" for compiler in found)
    return next((Library(path) for path in made if path.is_file()), Library(None, compiler=found[0]))


def build(source: Path, cache: Path, environ: Mapping[str, str]) -> Library:
    """The compiled library of `source` in `cache`, made now unless it is there."""
    found = find(source, cache, environ)
    if found.path is not None or not found.compiler:
        return found
    problem = ""
    for compiler in dict.fromkeys(compilers(environ)):
        path = cache / f"{_digest(source, compiler)}.so"
        try:
            _compile(source, compiler, path)
        except (OSError, subprocess.SubprocessError) as error:
            problem = f"{compiler} cannot compile them: {_said(error)}"
            continue
        return Library(path)
    return Library(None, problem)


def _compile(source: Path, compiler: str, path: Path) -> None:
    """Write the library to `path`. Raises what the last attempt raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"compiling kernels for this processor with {compiler} (once, some 10 s)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for number, options in enumerate(_OPTIONS):
            try:
                _run([compiler, *_ALWAYS, *options, str(source), "-o", str(made)])
                break
            except subprocess.SubprocessError:
                if number == len(_OPTIONS) - 1:
                    raise
        CDLL(str(made))  # what cannot be loaded is not kept
        os.replace(made, path)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _said(error: Exception) -> str:
    said = str(getattr(error, "stderr", "") or error).strip().splitlines() or [type(error).__name__]
    return next((line for line in said if "error" in line), said[0])[:200]


def _digest(source: Path, compiler: str) -> str:
    sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    there = os.stat(compiler)
    told = [compiler, f"{there.st_size} {int(there.st_mtime)}", repr((_ALWAYS, _OPTIONS)), _processor()]
    return hashlib.sha256(b"\0".join([*sources, *(text.encode() for text in told)])).hexdigest()[:24]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.system(), platform.machine(), *sorted(set(told))])


def state() -> Library:
    """This machine's, as far as it is without compiling."""
    return find(SOURCE, cache_root() / "kernels", os.environ)


@lru_cache(maxsize=1)
def library() -> Library:
    """This machine's, looked for or made once a process."""
    try:
        return build(SOURCE, cache_root() / "kernels", os.environ)
    except OSError as error:
        return Library(None, f"they cannot be kept: {error}")


@lru_cache(maxsize=1)
def find_library() -> CDLL | None:
    """Loaded; None where there is none, or what the cache holds cannot be loaded."""
    found = library()
    if found.path is None:
        return None
    try:
        return CDLL(str(found.path))
    except OSError as error:
        print(f"compiled kernels are left out: {error}; delete {found.path}", file=sys.stderr, flush=True)
        return None
