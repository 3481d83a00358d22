"""What every long measurement needs: results that are never half written, and an end on request that keeps them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Put `text` (UTF-8) in the place of `path` as a whole; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


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
