"""A runner as a process: started, asked for repetitions one at a time, stopped.

Between its repetitions a runner's process group is suspended (SIGSTOP), so that thread pools that spin and engines
that poll take nothing from the one being measured. `peers/protocol.py` is the other end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from bench_envs import ENVIRONMENTS, FOLDER, ROOT, python_of

SCRIPTS = ROOT / "benchmarks" / "peers"
LOGS = FOLDER / "logs"


class PeerError(Exception):
    """A runner failed; the message says how, and where its log is."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Peer:
    """One runner."""

    def __init__(self, name: str, environment: str, script: str, spec: Mapping[str, Any], timeout: float) -> None:
        """`timeout`: seconds a repetition, or getting ready, may take."""
        self.name = name
        self._timeout = timeout
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        variables = _variables(python_of(environment))
        if environment in ENVIRONMENTS:
            variables |= ENVIRONMENTS[environment].variables()
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python_of(environment)), "-u", str(SCRIPTS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                cwd=FOLDER,
                env=variables,
                start_new_session=True,
            )
        self._events: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        self._send({"spec": spec})

    def ready(self) -> dict[str, Any]:
        """Wait until it has loaded and warmed up; what it says of itself. Raises `PeerError`."""
        facts = self._event("ready")
        self._signal("SIGSTOP")
        return facts

    def go(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """One repetition. Raises `PeerError`."""
        self._signal("SIGCONT")
        self._send({"go": asked})
        try:
            return self._event("result")
        finally:
            self._signal("SIGSTOP")

    def stop(self) -> None:
        """End it, with whatever it started; may be called twice."""
        self._signal("SIGCONT")
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._signal("SIGTERM")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        self._signal("SIGKILL")
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; what it said last is read next
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _event(self, wanted: str) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        try:
            line = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerError(f"{self.name}: nothing within {self._timeout:.0f} s; log: {self.log}") from None
        if line is None:
            raise PeerError(f"{self.name} ended (exit code {self._process.wait()}); log: {self.log}\n{self._tail()}")
        event: dict[str, Any] = json.loads(line)
        kind = event.pop("event")
        if kind == "error":
            raise PeerError(f"{self.name}: {event['message']}; log: {self.log}")
        if kind != wanted:
            raise PeerError(f"{self.name} said {kind!r} where {wanted!r} was due; log: {self.log}")
        return event

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._events.put(line)
        self._events.put(None)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    def _signal(self, name: str) -> None:
        """Send a signal to the whole group, where there are such groups and signals."""
        number = getattr(signal, name, None)
        if number is not None and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _variables(interpreter: Path) -> dict[str, str]:
    """The environment of a runner: all cores, no network, nothing of the calling environment's Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    count = str(cores())
    return {
        **kept,
        "PATH": os.pathsep.join([str(interpreter.parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        # GNU OpenMP's default, for everyone: Coterie would look at the load, which is that of others that loaded before
        "GOMP_SPINCOUNT": "300000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
