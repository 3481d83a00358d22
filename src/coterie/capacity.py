"""How much memory this machine has, and has left, or the container this process may be in."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LIMIT, _USED = "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"
"""Of cgroup v2; the limit is "max" where there is none."""


def whole_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not tell. `root`: where proc and sys are."""
    sizes = _told(root, "MemTotal") or _physical(), _number(root / _LIMIT)
    return min((size for size in sizes if size is not None), default=None)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be had without taking them from anybody; None where the system does not tell."""
    limit, used = _number(root / _LIMIT), _number(root / _USED)
    left = max(0, limit - used) if limit is not None and used is not None else None
    return min((size for size in (_told(root, "MemAvailable"), left) if size is not None), default=None)


def _told(root: Path, name: str) -> int | None:
    """A line of Linux's meminfo, which is in kB."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
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
