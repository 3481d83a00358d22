"""Several servers, one of them slow and one dying: how long a batch of calls takes, ours beside others.

    python benchmarks/pool.py                       every system, three seeds; results in benchmarks/results/pool.json
    python benchmarks/pool.py --only Coterie --seeds 0
    python benchmarks/pool.py --table               the results as a Markdown table

Four fake servers, each a process of its own, generate in a number of slots and queue the rest; the last is four times
slower, the first is killed (SIGKILL) when half of the calls are answered and stays away. The fluid limit is the time
that all slots, busy without pause, would need: half the work on all servers, half on those that are left.

Peers are installed into environments of their own under build/bench-envs. What was measured is kept run by run; the
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import write_servers
from claims import _cpu as cpu_name
from keeping import write_json
from pool_systems import LiteLLM, Ours, PeerError, Plain, System, VllmRouter, Workload, install

from coterie.inference.fake import FakeProcess

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "pool.json"
ENVIRONMENTS = ROOT / "build" / "bench-envs"

SETTING = {
    "servers": 4,
    "slots": 8,
    "slow_factor": 4.0,
    "calls": 2000,
    "at_once": 256,
    "lowest_tokens": 1,
    "highest_tokens": 7,
    "latency_s": 0.004,
    "per_token_s": 0.024,
}
"""A server's slot is busy for latency_s + tokens * per_token_s; the slow one's so many times longer."""


def systems() -> list[System]:
    """Everything that is compared, ours first."""
    ours = version("coterie")
    return [
        Ours("power_of_two", ours),
        Ours("least_loaded", ours),
        Ours("prefix", ours),
        Plain("random"),
        Plain("round_robin"),
        *(LiteLLM(strategy, ENVIRONMENTS) for strategy in ("simple-shuffle", "least-busy", "latency-based-routing")),
        *(VllmRouter(policy, ENVIRONMENTS) for policy in ("round_robin", "power_of_two", "cache_aware")),
    ]


def fluid_s(workload: Workload) -> float:
    """The time that all slots, never idle, need for the workload, in seconds."""
    work = sum(SETTING["latency_s"] + tokens * SETTING["per_token_s"] for tokens in workload.tokens)
    slots, fast = SETTING["slots"], SETTING["servers"] - 1
    whole = slots * (fast + 1 / SETTING["slow_factor"])
    return work / 2 / whole + work / 2 / (whole - slots)


async def measure(system: System, seed: int) -> dict[str, Any]:
    """One batch by one system, on servers just started."""
    workload = Workload.of(
        int(SETTING["calls"]),
        int(SETTING["at_once"]),
        int(SETTING["lowest_tokens"]),
        int(SETTING["highest_tokens"]),
        seed,
    )
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                FakeProcess(
                    slots=int(SETTING["slots"]), latency_s=SETTING["latency_s"], per_token_s=SETTING["per_token_s"]
                )
            )
            for _ in range(int(SETTING["servers"]))
        ]
        await servers[-1].command("slow", factor=SETTING["slow_factor"])
        before_kill: list[Mapping[str, Any]] = []

        async def kill() -> None:
            before_kill.append(await servers[0].counts())
            servers[0].kill()

        outcome = await system.run(workload, [server.url for server in servers], kill)
        counts = [*before_kill, *[await server.counts() for server in servers[1:]]]
        await servers[0].revive()  # so that all of them can be told to end
    limit = fluid_s(workload)
    quantiles = statistics.quantiles(outcome.latencies, n=100)
    return {
        "system": system.name,
        "version": system.version,
        "seed": seed,
        "makespan_s": round(outcome.seconds, 3),
        "fluid_s": round(limit, 3),
        "ratio": round(outcome.seconds / limit, 4),
        "answered": len(outcome.latencies),
        "lost": outcome.lost,
        "failed_attempts": outcome.faults,
        "answers_by_server": [count["answered"] for count in counts],
        "p50_s": round(quantiles[49], 3),
        "p99_s": round(quantiles[98], 3),
    }


def read(path: Path) -> dict[str, Any]:
    """Results so far, of this setting."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["setting"] == SETTING:
            return found
        print(f"{path} is of another setting; starting anew", file=sys.stderr)
    return {"setting": SETTING, "runs": []}


async def measure_all(chosen: Sequence[System], seeds: Sequence[int], path: Path, again: bool) -> None:
    """Measure what is not measured yet. Seeds are the outer loop: a slow minute of the machine falls on everybody."""
    await install(ENVIRONMENTS)
    results = read(path)
    results["machine"] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for seed in seeds:
        for system in chosen:
            key = (system.name, seed)
            if not again and key in {(run["system"], run["seed"]) for run in results["runs"]}:
                continue
            run = await measure(system, seed)
            others = [r for r in results["runs"] if (r["system"], r["seed"]) != key]
            results["runs"] = [*others, run]
            write_json(path, results)
            print(f"{system.name}, seed {seed}: {run['makespan_s']} s, {run['ratio']} of the fluid limit", flush=True)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--table", action="store_true", help="print the results, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table:
        print(write_servers.pool(read(options.results)))
        return 0
    chosen = [system for system in systems() if options.only.lower() in system.name.lower()]
    if not chosen:
        print(f"error: no system is named like {options.only!r}", file=sys.stderr)
        return 2
    try:
        asyncio.run(measure_all(chosen, options.seeds, options.results, options.again))
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what is measured is kept", file=sys.stderr)
        return 130
    print(write_servers.pool(read(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
