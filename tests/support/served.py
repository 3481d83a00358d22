"""`coterie serve` in a process of its own, for tests that need a server with a real model behind it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAIN = "from coterie.cli.main import main; main()"


@contextmanager
def served(model: Path, adapter_dir: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server on `model` that may load adapters below `adapter_dir`, and its address.

    Its base is in float32 on every machine, so that what it says can be compared with what a learner computes. It is
    killed at the end where it has not ended by itself.
    """
    arguments = ["--port", str(port), "--adapter-dir", str(adapter_dir), "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", str(model), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        said = process.stdout.readline()
        found = re.findall(r"http://\S+(?=/v1)", said)
        if not found:
            process.kill()
            raise AssertionError(f"the server did not start: {said}{process.communicate()}")
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
