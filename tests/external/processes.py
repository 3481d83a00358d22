"""Servers as processes: started on a free port, waited for, killed with all their children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coterie.inference.wire import ServerSpec, server_spec
from coterie.serve.settings import ServeSettings
from coterie.serve.vllm import build_command

START_S = 420.0
"""A vLLM on two busy cores takes one to three minutes."""
STOP_S = 20.0


@dataclass(frozen=True)
class Launch:
    """How a server is started on a port."""

    argv: Callable[[int], tuple[str, ...]]
    environment: Mapping[str, str]
    api_key: str | None = None


def vllm_command(python: str, model: str, served: str, *, core: int) -> Launch:
    """A real vLLM with the flags of `coterie serve --backend vllm`, and what a small CPU machine needs.

    --no-enable-chunked-prefill   the CPU build dies of a request with a seed whose prompt it computes in parts
    --block-size 32               the smallest it takes; with its default of 128 short prompts are never cached
    --max-logprobs                distributions over larger sets of choices in one call
    """
    settings = ServeSettings(model=served, max_lora_rank=16, max_model_len=2048)
    flags = (
        "--block-size", "32", "--dtype", "float32", "--max-logprobs", "64",
        "--max-num-seqs", "32",
    )  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def argv(port: int) -> tuple[str, ...]:
        command = build_command(
            python, model, settings, host="127.0.0.1", port=port, max_loras=4, adapters={}, cpu=True, extra=flags
        )
        environment.update(command.environment)
        return command.argv

    return Launch(argv, environment)


def coterie_command(model: str, served: str, *adapters: Path, api_key: str | None = None) -> Launch:
    """`coterie serve` with the interpreter of these tests."""
    environment = {"OMP_NUM_THREADS": "1"}
    more: tuple[str, ...] = ()
    if api_key is not None:
        environment["COTERIE_TEST_KEY"] = api_key
        more = ("--api-key-env", "COTERIE_TEST_KEY")
    program = "from coterie.cli.main import main; main()"
    directories = [part for adapter in adapters for part in ("--adapter-dir", str(adapter))]

    def argv(port: int) -> tuple[str, ...]:
        return (
            sys.executable, "-c", program, "serve", model, "--served-name", served, "--port", str(port),
            "--dtype", "float32", *directories, *more,
        )  # fmt: skip

    return Launch(argv, environment, api_key)


@dataclass
class ServerProcess:
    """One server. It keeps its port over restarts, so that a pool finds it again."""

    name: str
    launch: Launch
    folder: Path
    port: int = 0
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Of the API."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def spec(self) -> ServerSpec:
        return server_spec(self.url, self.launch.api_key)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}-{self.starts}.log"

    def start(self) -> None:
        """Start it unless it runs; returns at once."""
        if self.alive:
            return
        self.port = self.port or _free_port()
        self.starts += 1
        argv = self.launch.argv(self.port)
        environment = {**os.environ, **self.launch.environment}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder
            )

    def wait_until_up(self, timeout_s: float = START_S) -> None:
        """Wait until /health says 200; fails the test with the end of the log when it does not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.alive:
                code = None if self.process is None else self.process.returncode
                pytest.fail(f"{self.name} ended with {code} while starting:\n{self.tail()}", pytrace=False)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"{self.name} was not up after {timeout_s:g} s:\n{self.tail()}", pytrace=False)

    def kill(self) -> None:
        """SIGKILL to it and all its children; nothing is said to anybody."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line for line in text if "Route: " not in line).strip()[-200 * lines :]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
