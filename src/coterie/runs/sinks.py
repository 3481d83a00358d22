"""Files a run writes while it goes on: one JSON line per update, and small files replaced as a whole.

A process may die at any byte. A line is whole or it is the last one and is dropped; a replaced file is the old one or
the new one, never a mixture.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from coterie.errors import RunFolderError


class UpdateFigures(Protocol):
    """What a metrics line is made of; `coterie.monitor.metrics.UpdateRecord` is one."""

    @property
    def update(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...


def json_text(value: Any, indent: int | None = None) -> str:
    """Standard JSON of `value`. Numbers that are not finite become null: JSON has no other word for them."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(_finite(inner) for inner in value)
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) as a whole, on disk before it gets its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = text.encode()
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror}; make room or choose another folder") from error


class MetricsFile:
    """metrics.jsonl: ``{"update": 3, "seconds": {...}, "metrics": {...}}``, one line per update, ascending."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: UpdateFigures) -> None:
        """Add the line of a finished update; it is handed to the operating system before this returns."""
        entry = {"update": record.update, "seconds": record.seconds, "metrics": record.metrics}
        line = (json_text(entry) + "\n").encode()
        try:
            self._drop_torn_line()
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path}: {error.strerror}") from error

    def truncate_after(self, update: int) -> None:
        """Forget every update past `update`, and a torn last line; what comes next is written again on resume."""
        if not self.path.exists():
            return
        kept = [json_text(entry) for entry in self.read(self.path) if entry["update"] <= update]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines; none when there is no file. A torn last line is left out.

        Raises:
            RunFolderError: another line is not what `append` writes.
        """
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
        entries = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
            try:
                entry = json.loads(line)
                whole = isinstance(entry, dict) and isinstance(entry.get("update"), int)
            except ValueError:
                whole = False
            if not whole:
                raise RunFolderError(f"{path}, line {number}: not a metrics line; delete the line or restore the file")
            entries.append(entry)
        return entries

    def _drop_torn_line(self) -> None:
        """Cut what a dying process left after the last newline, lest the next line be glued to it."""
        try:
            file = self.path.open("r+b")
        except FileNotFoundError:
            return
        with file:
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
