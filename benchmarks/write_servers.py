"""The sections of docs/performance.md about servers, from what `pool.py` and `client_cost.py` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_read import Verdict, table

Json = Mapping[str, Any]

POOL, CLIENTS = "Several servers, one slow, one dying", "What a call costs the client"
MAKESPAN = 1.15
"""Aim: time of the whole batch by the fluid limit, at most."""


def sections(results: Path) -> list[str]:
    """Both sections, from the files in the folder `results`."""
    return [
        _section(results / "pool.json", POOL, "python benchmarks/pool.py", pool),
        _section(results / "client_cost.json", CLIENTS, "python benchmarks/client_cost.py", clients),
    ]


def _section(path: Path, title: str, command: str, write: Any) -> str:
    if not path.is_file():
        return f"## {title}\n\n*Not measured yet; `{command}` does it.*"
    return f"## {title}\n\n{write(json.loads(path.read_text(encoding='utf-8')))}"


def pool(found: Json) -> str:
    """The table of systems, ours first where it is, and what is aimed at."""
    s = found["setting"]
    by_system: dict[str, list[Json]] = {}
    for run in found["runs"]:
        by_system.setdefault(run["system"], []).append(run)
    seeds = sorted({run["seed"] for run in found["runs"]})
    ranked = sorted(by_system.items(), key=lambda item: _ratio(item[1]))
    rows = [
        [
            name,
            f"{_ratio(runs):.2f} ({min(r['ratio'] for r in runs):.2f} to {max(r['ratio'] for r in runs):.2f})",
            str(sum(run["lost"] for run in runs)),
            str(sum(run["failed_attempts"] for run in runs)),
            f"{fmean(run['p50_s'] for run in runs):.2f}",
            f"{fmean(run['p99_s'] for run in runs):.2f}",
        ]
        for name, runs in ranked
    ]
    heads = ["", "time, by the fluid limit", "calls lost", "attempts that failed", "median latency, s", "99 %, s"]
    ours = [name for name, _ in ranked if name.startswith("Coterie")]
    others = [(name, runs) for name, runs in ranked if name not in ours]
    intro = (
        f"{s['servers']} fake servers, each a process with {s['slots']} slots and a queue; one is "
        f"{s['slow_factor']:g} times slower, one is killed when half of the {s['calls']} calls are answered and stays "
        f"away; {s['at_once']} callers at once, seeds {', '.join(map(str, seeds))}. The *fluid limit* is the time that "
        f"all slots need when none is ever idle. {_machine(found)}"
    )
    said = [
        Verdict(
            f"{name}, time by the fluid limit, worst seed", max(r["ratio"] for r in by_system[name]), MAKESPAN, False
        )
        for name in ours
    ]
    if ours and others:
        nearest, least = others[0][0], _ratio(others[0][1])
        times = least / max(_ratio(by_system[name]) for name in ours)
        said.append(Verdict(f"ahead of the next, {nearest}, whatever our policy", times, 1.0, True))
    said.append(
        Verdict("calls lost by Coterie", sum(run["lost"] for name in ours for run in by_system[name]), 0, False, "")
    )
    return "\n\n".join([intro, table(heads, rows), "\n".join(verdict.text() for verdict in said)])


def clients(found: Json) -> str:
    """The table of clients, and what is aimed at."""
    rows, verdicts = [], []
    floor = max((_worst(client) for client in found["clients"] if client["client"] == "aiohttp"), default=0.0)
    bound = f"aiohttp alone, which it is made of, takes {floor:.2f} ms in the same rounds" if floor else ""
    for client in found["clients"]:
        versions = ", ".join(f"{name} {version}" for name, version in client["versions"].items() if name != "python")
        for run in client["runs"]:
            cpu = run["cpu_ms"]
            rows.append(
                [client["title"], versions, str(run["concurrency"]),
                 f"{cpu['median']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f})", f"{run['calls_per_second']:.0f}"]
            )  # fmt: skip
        if client["goal_cpu_ms"] is not None:
            what = f"{client['title']}, CPU a call"
            verdicts.append(Verdict(what, _worst(client), client["goal_cpu_ms"], False, unit=" ms", bound=bound))
    intro = (
        f"CPU milliseconds of the calling process for a call of {found['prompt_characters']} characters and "
        f"{found['max_tokens']} tokens, answered with ids and log-probabilities by a fake server; medians of "
        f"{found['rounds']} rounds of {found['calls']} calls, clients taking turns. {_machine(found)}"
    )
    heads = ["", "versions", "calls at once", "CPU ms a call", "calls a second"]
    return "\n\n".join([intro, table(heads, rows), "\n".join(verdict.text() for verdict in verdicts)])


def _worst(client: Json) -> float:
    """Median CPU ms a call at the concurrency where it is highest."""
    return max(float(run["cpu_ms"]["median"]) for run in client["runs"])


def _ratio(runs: Sequence[Json]) -> float:
    return fmean(run["ratio"] for run in runs)


def _machine(found: Json) -> str:
    m = found["machine"]
    return f"On {m['cores']} cores of {m['cpu']}."
