"""What every long measurement needs: results that are never half written, and an end on request that keeps them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coterie.runs.sinks import write_atomically


def replace_file(path: Path, text: str) -> None:
    """Put `text` in the place of `path` as a whole; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Put `data` in the place of `path` as a whole. Raises `ValueError` for numbers JSON does not have."""
    replace_file(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the measurement as Ctrl-C does: by `KeyboardInterrupt`."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
