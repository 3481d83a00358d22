"""A process at a terminal that can be closed under it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.support.served import MAIN


class AtTerminal:
    """`coterie ARGUMENTS` in a terminal of its own; standard error is a pipe.

    `stays`: hang-ups are ignored, as under nohup; otherwise they come as they come, however these tests were started.
    """

    def __init__(self, arguments: Sequence[str], *, stays: bool) -> None:
        self._ours, theirs = pty.openpty()

        def at_the_terminal() -> None:
            os.setsid()
            os.close(os.open(os.ttyname(1), os.O_RDWR))  # the first one a new session opens is its own
            signal.signal(signal.SIGHUP, signal.SIG_IGN if stays else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True,
            preexec_fn=at_the_terminal, env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self.shown = ""

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def until_shown(self, text: str) -> None:
        """Wait until the terminal shows `text` or the process is over."""
        while self.process.poll() is None and text not in self.shown:
            with contextlib.suppress(OSError):
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
            time.sleep(0.01)

    def close(self) -> None:
        """Close the terminal, which whoever runs in it is told by a hang-up."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def end(self) -> tuple[int, str]:
        """Exit code, once it ended by itself, and standard error."""
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said
