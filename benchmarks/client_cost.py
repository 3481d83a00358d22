"""What a call costs the process that makes it: CPU milliseconds through our tiers and through other clients.

    python benchmarks/client_cost.py                        results go to benchmarks/results/client_cost.json
    python benchmarks/client_cost.py --rounds 2 --calls 64 --results DIR     a trial
    python benchmarks/client_cost.py --python openai=PATH   use this interpreter instead of making an environment

The server is the fake, in a process of its own, and answers with ids and log-probabilities as a rollout needs them.
Every client runs in a process and an environment of its own, made at first under build/bench-envs. Clients take
turns: a round asks each of them once at each concurrency, in an order drawn anew, so that a slower minute of the
machine falls on all. Reported are medians over the rounds, with the lowest and highest round.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from claims import machine
from claims_file import RESULTS, ROOT
from keeping import write_json

from coterie.inference.fake import ByteTokenizer, FakeProcess

RUNNER = ROOT / "benchmarks" / "peers" / "client_calls.py"
ENVIRONMENTS = ROOT / "build" / "bench-envs"
TEXT = "You hold the blue card. Your partner saw a triangle. Which door do you open, and why? " * 2
MAX_TOKENS = 8
GOAL_MS = {"coterie": 0.25, "coterie-chat": 0.25, "coterie-camel": 1.0}
"""The most a call should cost, in CPU ms."""


@dataclass(frozen=True, slots=True)
class Client:
    """One client: its name in peers/client_calls.py, and the packages of its environment (none: this one)."""

    name: str
    title: str
    environment: str = ""
    packages: tuple[str, ...] = ()


CAMEL = ("-c", str(ROOT / "constraints-camel.txt"), "-e", f"{ROOT}[camel]")
CLIENTS = (
    Client("coterie", "Coterie, /completions"),
    Client("coterie-chat", "Coterie, /chat/completions"),
    Client("coterie-camel", "Coterie through CAMEL, /chat/completions", "camel", CAMEL),
    Client("camel", "CAMEL's own model for vLLM, /chat/completions", "camel", CAMEL),
    Client("aiohttp", "aiohttp alone, /completions"),
    Client("openai", "openai package (httpx), /completions", "openai", ("openai==3.54.0",)),
    Client("openai-chat", "openai package (httpx), /chat/completions", "openai", ("openai==3.54.0",)),
)


class BenchmarkError(Exception):
    """A client cannot be measured."""


def python_of(client: Client, given: Mapping[str, str]) -> str:
    """The interpreter of a client, its environment made when it is missing."""
    if not client.environment:
        return sys.executable
    if client.environment in given:
        return given[client.environment]
    folder = ENVIRONMENTS / f"{client.environment}-client"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "coterie-stamp"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != repr(client.packages):
        print(f"==> environment {client.environment}: {', '.join(client.packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *client.packages], check=True)
        stamp.write_text(repr(client.packages), encoding="utf-8")
    return str(python)


class Runner:
    """A client's process."""

    def __init__(self, client: Client, process: asyncio.subprocess.Process) -> None:
        self.client = client
        self._process = process
        self.versions: Mapping[str, str] = {}

    async def tell(self, line: Mapping[str, Any]) -> Any:
        """Its answer to one line. Raises `BenchmarkError` when it ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        answer = await self._process.stdout.readline()
        if not answer:
            code = await self._process.wait()
            raise BenchmarkError(f"{self.client.title} ended with exit code {code}; what it wrote above says why")
        return json.loads(answer)


@asynccontextmanager
async def runner(client: Client, python: str, url: str) -> Any:
    """A client's process, ready for calls."""
    process = await asyncio.create_subprocess_exec(
        python, str(RUNNER), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    made = Runner(client, process)
    try:
        spec = {"client": client.name, "url": url, "model": "fake-model", "max_tokens": MAX_TOKENS}
        prompt = {"prompt": ByteTokenizer().encode(TEXT), "text": TEXT}
        made.versions = (await made.tell({**spec, **prompt}))["versions"]
        yield made
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def measure(
    clients: Sequence[Client], given: Mapping[str, str], rounds: int, calls: int, concurrencies: Sequence[int]
) -> dict[str, Any]:
    """All rounds; the content of the results file."""
    pythons = {client.name: python_of(client, given) for client in clients}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(c.name, n): [] for c in clients for n in concurrencies}
    rng = random.Random(0)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(FakeProcess(keep_alive_s=3600))  # all wait for their turn
        runners = [await stack.enter_async_context(runner(c, pythons[c.name], server.url)) for c in clients]
        # connections, imports at first use; and the server remembers its answers, so that it is quick afterwards
        for one in runners:
            await one.tell({"calls": calls, "concurrency": max(concurrencies)})
        for number in range(rounds):
            turns = [(one, n) for one in runners for n in concurrencies]
            rng.shuffle(turns)
            for one, n in turns:
                runs[one.client.name, n].append(await one.tell({"calls": calls, "concurrency": n}))
            print(f"round {number + 1} of {rounds}", flush=True)
    return {
        "date": dt.date.today().isoformat(),
        "machine": {key: value for key, value in machine(defaultdict(str)).items() if value},
        "calls": calls,
        "rounds": rounds,
        "prompt_characters": len(TEXT),
        "max_tokens": MAX_TOKENS,
        "clients": [
            {
                "client": one.client.name,
                "title": one.client.title,
                "versions": one.versions,
                "goal_cpu_ms": GOAL_MS.get(one.client.name),
                "runs": [summary(n, runs[one.client.name, n]) for n in concurrencies],
            }
            for one in runners
        ],
    }


def summary(concurrency: int, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of a client at a concurrency."""
    cpu = [1000 * run["cpu_s"] / run["calls"] for run in runs]
    rate = [run["calls"] / run["seconds"] for run in runs]
    return {
        "concurrency": concurrency,
        "cpu_ms": {"median": round(median(cpu), 4), "low": round(min(cpu), 4), "high": round(max(cpu), 4)},
        "calls_per_second": round(median(rate), 1),
    }


def show(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    lines = [f"{'client':44} {'at once':>8} {'CPU ms a call':>14} {'low to high':>16} {'calls/s':>9}"]
    for client in found["clients"]:
        for run in client["runs"]:
            cpu = run["cpu_ms"]
            spread = f"{cpu['low']:.3f} to {cpu['high']:.3f}"
            lines.append(
                f"{client['title']:44} {run['concurrency']:8} {cpu['median']:14.3f} {spread:>16} "
                f"{run['calls_per_second']:9.0f}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=512, help="of each client in a round, at each concurrency")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--only", nargs="+", choices=[client.name for client in CLIENTS], help="these clients")
    parser.add_argument("--python", action="append", default=[], metavar="ENVIRONMENT=PATH")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.python)
    clients = [client for client in CLIENTS if not options.only or client.name in options.only]
    try:
        found = asyncio.run(measure(clients, given, options.rounds, options.calls, options.concurrency))
    except (BenchmarkError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(found))
    if options.only and options.results == RESULTS:
        print("not kept: only some clients were measured (give --results DIR to keep it there)")
        return 0
    write_json(options.results / "client_cost.json", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
