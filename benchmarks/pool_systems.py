"""What `pool.py` compares: ways to bring many calls to several servers, each doing the same calls to the same servers.

    System.run(workload, urls, half) -> Outcome         half() is awaited once, when half of the calls are answered

Ours and the plain ones run in this process, on Coterie's HTTP transport; LiteLLM's Router in a process and an
environment of its own, with its own client; vllm-router as a server of its own between that transport and the servers.
Whatever gives up on a failed call is asked again by its caller, `ATTEMPTS` times in all, because a caller would.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
import venv
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coterie.errors import CoterieError
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.pool import ServerPool
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireRequest, server_spec

PACKAGES = {"litellm": "litellm==1.106.2", "vllm-router": "vllm-router==0.1.17"}
"""Environment -> what is in it."""
ATTEMPTS = 8
TIMEOUT_S = 120.0
MODEL = "fake-model"
WARM_UP = 16
"""Calls before the measurement, one after the other, for everybody: connections are open, modules loaded."""

Half = Callable[[], Awaitable[None]]


class PeerError(CoterieError):
    """A peer could not be installed or started, or broke its protocol."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The calls: how many tokens each generates, and how many are under way at once."""

    tokens: tuple[int, ...]
    at_once: int
    seed: int

    @staticmethod
    def of(count: int, at_once: int, lowest: int, highest: int, seed: int) -> Workload:
        rng = random.Random(seed)
        return Workload(tuple(rng.randint(lowest, highest) for _ in range(count)), at_once, seed)


@dataclass(slots=True)
class Outcome:
    """What became of the calls."""

    seconds: float = 0.0
    """From the first call to the last answer."""
    latencies: list[float] = field(default_factory=list)
    """Of answered calls, failed attempts and waiting included."""
    lost: int = 0
    """Calls without an answer."""
    faults: int = 0
    """Failed attempts that reached the caller."""


class System(Protocol):
    """One way."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    async def run(self, workload: Workload, urls: Sequence[str], half: Half) -> Outcome: ...


def request(number: int, tokens: int) -> WireRequest:
    """Call `number`."""
    messages = ({"role": "user", "content": f"call {number}"},)
    return WireRequest(MODEL, messages=messages, max_tokens=tokens, capture=False, extra={"ignore_eos": True})


async def all_calls(workload: Workload, half: Half, one: Callable[[int, int], Awaitable[int]]) -> Outcome:
    """Do every call by `one(number, tokens)`, which returns how many attempts failed before the answer."""
    for _ in range(WARM_UP):
        await one(-1, 1)
    outcome = Outcome()
    places = asyncio.Semaphore(workload.at_once)
    halves: list[asyncio.Task[None]] = []

    async def call(number: int, tokens: int) -> None:
        async with places:
            began = time.perf_counter()
            try:
                outcome.faults += await one(number, tokens)
            except ServerFault as fault:
                print(f"call {number} is lost: {fault}", file=sys.stderr)
                outcome.lost += 1
            else:
                outcome.latencies.append(time.perf_counter() - began)
        if len(outcome.latencies) == len(workload.tokens) // 2:
            halves.append(asyncio.ensure_future(half()))

    began = time.perf_counter()
    await asyncio.gather(*(call(number, tokens) for number, tokens in enumerate(workload.tokens)))
    outcome.seconds = time.perf_counter() - began
    await asyncio.gather(*halves)
    return outcome


@dataclass(frozen=True, slots=True)
class Ours:
    """`ServerPool`."""

    policy: str
    version: str

    @property
    def name(self) -> str:
        return f"Coterie, {self.policy}"

    async def run(self, workload: Workload, urls: Sequence[str], half: Half) -> Outcome:
        transport, control = HttpTransport(), HttpControl()
        pool = ServerPool([server_spec(url) for url in urls], control, policy=self.policy, seed=workload.seed)
        await pool.start()

        async def one(number: int, tokens: int) -> int:
            failed = 0

            def fault(server: ServerSpec, what: ServerFault, seconds: float) -> None:
                nonlocal failed
                failed += 1

            wire = request(number, tokens)
            await pool.run(
                lambda server, remaining_s: transport.call(server, wire, remaining_s),
                timeout_s=TIMEOUT_S,
                attempts=ATTEMPTS,
                on_fault=fault,
                weight=tokens,
                prefix=number % 64,
            )
            return failed

        try:
            return await all_calls(workload, half, one)
        finally:
            await pool.close()
            await transport.close()
            await control.close()


async def persistently(ask: Callable[[int], Awaitable[object]]) -> int:
    """Call `ask(attempt)` until it answers; returns how many attempts failed. Raises the last `ServerFault`."""
    for attempt in range(ATTEMPTS):
        try:
            await ask(attempt)
        except ServerFault as fault:
            if fault.kind is FaultKind.REJECTED or attempt + 1 == ATTEMPTS:
                raise
            await asyncio.sleep(0.05 * 2**attempt)
        else:
            return attempt
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class Plain:
    """A server by chance or in turn, call by call; no memory of failures."""

    how: str
    version: str = ""

    @property
    def name(self) -> str:
        return {"random": "random.choice", "round_robin": "round robin"}[self.how]

    async def run(self, workload: Workload, urls: Sequence[str], half: Half) -> Outcome:
        transport = HttpTransport(connections_per_server=workload.at_once)
        servers = [server_spec(url) for url in urls]
        rng = random.Random(workload.seed)
        turn = 0

        async def one(number: int, tokens: int) -> int:
            async def ask(attempt: int) -> object:
                nonlocal turn
                turn += 1
                server = rng.choice(servers) if self.how == "random" else servers[turn % len(servers)]
                return await transport.call(server, request(number, tokens), TIMEOUT_S)

            return await persistently(ask)

        try:
            return await all_calls(workload, half, one)
        finally:
            await transport.close()


@dataclass(frozen=True, slots=True)
class VllmRouter:
    """PyPI's vllm-router, in its own process."""

    policy: str
    environments: Path
    version: str = PACKAGES["vllm-router"]

    @property
    def name(self) -> str:
        return f"vllm-router, {self.policy}"

    async def run(self, workload: Workload, urls: Sequence[str], half: Half) -> Outcome:
        port, metrics = free_port(), free_port()
        roots = [url.removesuffix("/v1") for url in urls]
        log = self.environments / "vllm-router.log"
        with log.open("w", encoding="utf-8") as file:
            process = await asyncio.create_subprocess_exec(
                str(self.environments / "vllm-router" / "bin" / "vllm-router"),
                "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics),
                "--policy", self.policy, "--worker-urls", *roots,
                stdout=file, stderr=file,
            )  # fmt: skip
        transport = HttpTransport(connections_per_server=workload.at_once)
        control = HttpControl()
        server = server_spec(f"http://127.0.0.1:{port}")
        try:
            await self._ready(process, control, server, log)

            async def one(number: int, tokens: int) -> int:
                return await persistently(lambda _: transport.call(server, request(number, tokens), TIMEOUT_S))

            return await all_calls(workload, half, one)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            await transport.close()
            await control.close()

    async def _ready(
        self, process: asyncio.subprocess.Process, control: HttpControl, server: ServerSpec, log: Path
    ) -> None:
        for _ in range(300):
            if process.returncode is not None:
                break
            try:
                return await control.health(server)
            except ServerFault:
                await asyncio.sleep(0.1)
        raise PeerError(f"vllm-router did not start; see {log}")


@dataclass(frozen=True, slots=True)
class LiteLLM:
    """LiteLLM's Router, in a process of its own environment."""

    strategy: str
    environments: Path
    version: str = PACKAGES["litellm"]

    @property
    def name(self) -> str:
        return f"LiteLLM Router, {self.strategy}"

    async def run(self, workload: Workload, urls: Sequence[str], half: Half) -> Outcome:
        log = self.environments / "litellm.log"
        with log.open("w", encoding="utf-8") as file:
            process = await asyncio.create_subprocess_exec(
                str(self.environments / "litellm" / "bin" / "python"),
                str(Path(__file__).with_name("pool_litellm.py")),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                limit=2**24,
                env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            )
        assert process.stdin is not None
        assert process.stdout is not None
        given = {
            "urls": list(urls),
            "tokens": workload.tokens,
            "at_once": workload.at_once,
            "strategy": self.strategy,
            "model": MODEL,
            "attempts": ATTEMPTS,
            "timeout_s": TIMEOUT_S,
            "warm_up": WARM_UP,
        }
        process.stdin.write(json.dumps(given).encode())
        process.stdin.close()
        said: dict[str, Any] = {}
        async for line in process.stdout:
            event = json.loads(line)
            if event.get("half"):
                await half()
            else:
                said = event
        if await process.wait() or not said:
            raise PeerError(f"LiteLLM's Router broke off; see {log}")
        return Outcome(**said)


def free_port() -> int:
    """A port nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def install(environments: Path) -> None:
    """Make the peers' environments, unless they are there. Raises `PeerError`."""
    for name, package in PACKAGES.items():
        folder = environments / name
        stamp = folder / "coterie-stamp"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == package:
            continue
        print(f"==> {package} into {folder}", flush=True)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        process = await asyncio.create_subprocess_exec(
            str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", package
        )
        if await process.wait():
            raise PeerError(f"pip could not install {package} into {folder}; its output is above")
        stamp.write_text(package, encoding="utf-8")
