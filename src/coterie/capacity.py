"""How much memory this machine has, and has left, or the container this process may be in."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_MACHINE, _CONTAINER = "proc/meminfo", "sys/fs/cgroup/memory.stat"
_LIMIT, _USED = "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"
"""Of cgroup v2; the limit is "max" where there is none."""


def whole_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not tell. `root`: where proc and sys are."""
    return _least(_told(root / _MACHINE, "MemTotal:", 1024) or _physical(), _number(root / _LIMIT))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be had without taking them from anybody; None where the system does not tell."""
    limit, used = _number(root / _LIMIT), _number(root / _USED)
    left = None
    if limit is not None and used is not None:
        # files that were read count as used, but give way
        left = max(0, limit - used + (_told(root / _CONTAINER, "inactive_file", 1) or 0))
    return _least(_told(root / _MACHINE, "MemAvailable:", 1024), left)


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _told(path: Path, name: str, unit: int) -> int | None:
    """The number that follows `name` at the beginning of a line, times bytes of a unit."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words and words[0] == name:
                return int(words[1]) * unit
    return None


def _physical() -> int | None:
    """Where there is no meminfo."""
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None
