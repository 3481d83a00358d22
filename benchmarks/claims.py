"""Make the evidence for what README and docs claim: run the shipped configs, keep what they came to.

    python benchmarks/claims.py tasks                    three models on the task queue, held-out accuracy
    python benchmarks/claims.py signaling                two models invent a code
    python benchmarks/claims.py matrix                   one dilemma under different modes

Each run is the command a user would type (`coterie train CONFIG --seed N`), in a process of its own, one after
another. What it came to goes into benchmarks/results/ at once, so that a series that was interrupted goes on where it
stopped. Run `python benchmarks/write_docs.py` afterwards.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from claims_file import CONFIGS, RESULTS, ROOT, ClaimFile, digest, read, write
from keeping import ended_by_sigterm

CURVES = {
    "tasks": r"play/[^/]+/(accuracy|reward)",
    "signaling": r"play/[^/]+/(accuracy|reward)|exact/success",
    "prisoners_dilemma": r"play/[^/]+/reward|exact/cooperation",
}
"""Claim -> the metrics kept of every update."""

LEVELS = (0.5, 0.75, 0.85, 0.95)
"""Of cooperation, in mode mixed. Scores are 1, 0.6, 0.2 and 0, so with reward b * mean / 2 + (1 - b) * rank share
cooperating with a defector pays from b = 0.77 on, and defecting from a cooperator no longer pays from 0.91 on."""


class RunFailedError(Exception):
    """A run did not end as it should; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One setting of a claim's config."""

    name: str
    """ "" where the claim has only one."""
    changes: tuple[str, ...] = ()
    """``key=value`` for ``--set``."""
    facts: Mapping[str, Any] | None = None
    """Kept with the run."""


def variants(claim: str, modes: Sequence[str], levels: Sequence[float]) -> list[Variant]:
    """What is run of a claim, seeds aside."""
    if claim != "prisoners_dilemma":
        return [Variant("")]
    found = [Variant(mode, (f"mode={mode}",), {"mode": mode}) for mode in modes if mode != "mixed"]
    for level in sorted(levels) if "mixed" in modes else ():
        changes = ("mode=mixed", f"scenario.options.cooperation_level={level}")
        found.append(Variant(f"mixed {level:.2f}", changes, {"mode": "mixed", "cooperation_level": level}))
    return found


def train(config: Path, folder: Path, seed: int, changes: Sequence[str]) -> float:
    """Run the command; returns its wall time in seconds. Raises `RunFailedError`."""
    command = [sys.executable, "-c", "from coterie.cli.main import main; main()", "train", str(config)]
    command += ["--folder", str(folder), "--seed", str(seed)]
    for change in changes:
        command += ["--set", change]
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    if code:
        shown = shlex.join(["coterie", *command[3:]])
        raise RunFailedError(f"`{shown}` ended with exit code {code}; what it said stands above")
    return time.perf_counter() - started


def collect(folder: Path, claim: str) -> dict[str, Any]:
    """What a finished run came to.

    Raises:
        RunFailedError: the folder has no metrics or no held-out results.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        heldout = json.loads((folder / "results" / "heldout.json").read_text(encoding="utf-8"))
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFailedError(
            f"{error.filename} is missing; the config must train (updates) and evaluate (evaluation.tasks)"
        ) from error
    names = sorted({name for r in records for name in r["metrics"] if re.fullmatch(CURVES[claim], name)})
    curve: dict[str, list[float | None]] = {"update": [r["update"] for r in records]}
    for name in names:
        curve[name] = [_rounded(r["metrics"].get(name), 4) for r in records]
    run = {
        "updates": len(records),
        "training_seconds": training_seconds(records),
        "heldout": _rounded(heldout, 6),
        "curve": curve,
        "machine": machine(info["versions"]),
    }
    if claim == "tasks":
        run["updates_per_round"] = updates_per_round(config)
    return run


STANDSTILL = 5.0
"""Times the median from which an update counts as a median one."""


def training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Of a run's records: how long its updates took, without the time during which the machine was asleep or the run
    suspended."""
    seconds = [float(record["seconds"]["total"]) for record in records]
    typical = median(seconds) if seconds else 0.0
    return round(sum(typical if taken > STANDSTILL * typical else taken for taken in seconds), 1)


def updates_per_round(config: Mapping[str, Any]) -> int:
    """Updates after which the queue's task types repeat: only whole rounds can be compared with one another."""
    kinds = len(config["scenario"]["options"].get("types", range(5)))
    tasks: int = config["rollout"]["tasks_per_update"]
    return math.lcm(kinds, tasks) // tasks


def machine(versions: Mapping[str, str]) -> dict[str, Any]:
    """What the numbers were measured on; `versions` is from the run."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": versions["python"],
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "coterie": versions["coterie"],
    }


def _cpu() -> str:
    try:
        listed = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        listed = None
    return " ".join(listed[1].split()) if listed else platform.processor() or "unknown processor"


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: _rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner, digits) for inner in value]
    return value


def measure(
    claim: str, chosen: Sequence[Variant], seeds: Sequence[int], changes: Sequence[str], options: argparse.Namespace
) -> None:
    """Run what is not in the results yet, and keep each outcome as soon as there is one. Raises `RunFailedError`."""
    config = ROOT / CONFIGS[claim]
    if not config.is_file():
        raise RunFailedError(f"there is no config {config}")
    path = options.results / f"{claim}.json"
    known = digest(config, changes)
    found = read(path) or ClaimFile(claim, CONFIGS[claim], known)
    if found.digest != known:
        print(f"{path} is of another state of {CONFIGS[claim]}: its {len(found.runs)} runs are replaced", flush=True)
        found = ClaimFile(claim, CONFIGS[claim], known)
    series = [(variant, seed) for variant in chosen for seed in seeds]
    work = Path(tempfile.mkdtemp(prefix=f"coterie-{claim}-"))
    try:
        for number, (variant, seed) in enumerate(series, start=1):
            title = f"{claim} {variant.name}".strip() + f", seed {seed} ({number} of {len(series)})"
            done = found.find(variant.name, seed)
            if done is not None and not options.again:
                print(f"== {title}: measured {done['date']} already (--again measures it once more)", flush=True)
                continue
            print(f"== {title}", flush=True)
            folder = work / f"{variant.name or claim}-{seed}".replace(" ", "-")
            wall = train(config, folder, seed, [*variant.changes, *changes])
            run = {
                "variant": variant.name,
                **(variant.facts or {}),
                "seed": seed,
                "date": dt.datetime.now(dt.UTC).date().isoformat(),
                "wall_seconds": round(wall, 1),
                **collect(folder, claim),
            }
            found = found.merged(run)
            write(path, found)
            print(f"== kept in {path}", flush=True)
            if not options.keep:
                shutil.rmtree(folder)
    finally:
        if options.keep:
            print(f"run folders: {work}", flush=True)
        else:
            shutil.rmtree(work, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("claim", choices=("tasks", "signaling", "matrix"))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    made.add_argument("--again", action="store_true", help="measure runs again that are in the results already")
    made.add_argument("--keep", action="store_true", help="keep the run folders")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    made.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
        help="change the config of every run; write_docs.py does not accept such results, so give --results too",
    )  # fmt: skip
    made.add_argument(
        "--modes", nargs="+", default=["cooperative", "competitive", "mixed"], metavar="MODE",
        choices=("cooperative", "competitive", "mixed"), help="of matrix; default: all three",
    )  # fmt: skip
    made.add_argument(
        "--levels", type=float, nargs="+", default=list(LEVELS), metavar="L",
        help=f"cooperation levels of matrix in mode mixed; default: {' '.join(map(str, LEVELS))}",
    )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    claim = "prisoners_dilemma" if options.claim == "matrix" else options.claim
    if options.changes and options.results == RESULTS:
        print("error: --set needs --results DIR: benchmarks/results is for the configs as shipped", file=sys.stderr)
        return 2
    try:
        with ended_by_sigterm():
            chosen = variants(claim, options.modes, options.levels)
            measure(claim, chosen, options.seeds, options.changes, options)
    except (RunFailedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what is measured is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
