"""One process at a time writes a run: a lock file made with O_EXCL that names its owner.

A lock outlives a process that is killed. Whoever finds one asks whether its owner still lives: on this machine by its
process id and birth time, elsewhere it cannot know and says which file to delete.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coterie.errors import RunFolderError
from coterie.runs.sinks import json_text, write_atomically

LOCK_NAME = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing.

    Raises:
        RunFolderError: a process that may be alive (or this one) holds it, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid()), "taken": time.time_ns()}
    text = json_text(mine)
    if not _make(path, text):
        _take_over(path, text, folder)
    try:
        yield
    finally:
        if _read_text(path) == text:
            path.unlink(missing_ok=True)


def _make(path: Path, text: str) -> bool:
    """Make the file with this text; False when it is there already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunFolderError(f"cannot write in folder {path.parent}: {error.strerror}; is it read-only?") from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def _take_over(path: Path, text: str, folder: Path) -> None:
    """Replace the lock of a dead process. A second lock serialises those who try at once."""
    guard = path.with_name("lock.takeover")
    if not _make(guard, text):
        raise RunFolderError(f"run {folder} is being taken over by another process; if not, delete {guard}")
    try:
        owner = _owner(_read_text(path))
        if owner is not None and _alive(owner):
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            raise RunFolderError(f"run {folder} is in use by {who}; wait, stop it, or (if it is gone) delete {path}")
        if owner is None:
            if not path.exists() and _make(path, text):
                return  # its owner let go in between
            raise RunFolderError(f"run {folder} is in use by an unknown process; if there is none, delete {path}")
        write_atomically(path, text)  # its owner is dead, and only the holder of the guard may replace it
    finally:
        guard.unlink(missing_ok=True)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _owner(text: str | None) -> dict[str, Any] | None:
    try:
        owner = json.loads(text or "")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process may still live; another machine's process always may."""
    pid = owner["pid"]
    if owner.get("host") != socket.gethostname() or os.name == "nt":
        return True  # signal 0 would end the process on Windows, and does not reach another machine
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    born = _born(pid)
    return born is None or owner.get("born") is None or born == owner["born"]


def _born(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, where the system tells (Linux): process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19]
