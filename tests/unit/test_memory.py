"""Freed memory stays with the process, unless the user set how it allocates."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
import ctypes, sys
from coterie.lm.memory import keep_freed_memory
print(keep_freed_memory(), hasattr(ctypes.CDLL(None), "gnu_get_libc_version"))
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.empty(1 << 18).fill_(1.0) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _asked(**environ: str) -> tuple[bool, bool, int]:
    """Whether it is done, whether this is glibc, and pages asked for anew when 64 MB in pieces are taken again."""
    told = subprocess.run([sys.executable, "-c", ASK], env=environ, capture_output=True, text=True, check=True).stdout
    done, glibc, faults = told.split()
    return done == "True", glibc == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_that_is_wanted_again_is_there() -> None:
    done, glibc, faults = _asked()
    assert done == glibc
    assert faults < 4000 or not glibc


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("setting", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")])
def test_what_the_user_set_stays(setting: tuple[str, str]) -> None:
    done, _, faults = _asked(**dict([setting]))
    assert not done
    assert faults > 8000
