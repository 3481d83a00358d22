"""A stream to write to for as long as anybody reads it; a run outlives its terminal.

a write fails because the reader is gone  -> this and all that follows is dropped
a write fails for another reason (no space left) -> this is dropped, the next is tried again
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Any, TextIO

_GONE = (errno.EIO, errno.ENXIO)
"""Of a terminal that was closed."""


class LastingStream:
    """`stream`, whose writes never raise `OSError`.

    Once the reader is gone, the stream's file descriptor leads to the null device: so nothing else that writes there
    fails either, nor does the interpreter when it flushes at exit.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """As the stream's own; what cannot be written counts as written."""
        if not self._gone:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        if not self._gone:
            try:
                self._stream.flush()
            except OSError as error:
                self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError) and error.errno not in _GONE:
            return
        self._gone = True
        with suppress(OSError, ValueError):  # a stream need have no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
