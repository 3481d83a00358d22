"""Measure Coterie beside what people would pick instead, on this machine, in one run.

    python benchmarks/bench.py                     everything (`make bench`); two hours on two cores
    python benchmarks/bench.py --quick             tiny sizes, one repetition: shows that everything runs
    python benchmarks/bench.py --only generate     one suite
    python benchmarks/bench.py --without "*defaults*" "*bfloat16*"    half the time where bfloat16 is not native

Peers live in environments of their own, made at first (`bench_envs.py`); every runner is a process that loads, warms
up, and does one repetition when asked (`bench_peers.py`, `peers/`). Within a suite repetitions take turns: a round
asks every entry once, in an order drawn anew, and before and after each round the rate of matrix products is measured,
so that a slower minute of the machine falls on everybody and on the limit alike. Results are kept after every round;
at the end `write_performance.py` turns them into docs/performance.md (with `--results
benchmarks/results/bench-NAME.json`, for another kind of processor: into docs/performance-NAME.md; with --quick or any
other --results: into a page beside them).
"""

from __future__ import annotations

import argparse
import datetime as dt
import fnmatch
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import write_performance
from bench_envs import FOLDER, ROOT, InstallError, ensure
from bench_peers import Peer, PeerError
from bench_suites import FULL, NAMES, QUICK, Runner, Suite, material_spec, suites
from claims import machine
from keeping import ended_by_sigterm, write_json
from write_performance import RESULTS

QUICK_RESULTS = FOLDER.parent / "bench-quick.json"

PATIENCE = 900.0
"""Seconds of repetitions of one entry after which the other rounds do without it."""


class Run:
    """One suite being measured."""

    def __init__(self, suite: Suite, rates: Peer, repeats: int, timeout: float) -> None:
        self.suite = suite
        self.repeats = suite.repeats or repeats
        self._rates, self._timeout = rates, timeout
        self._peers: dict[str, Peer] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        """Runner -> why it cannot be measured."""
        self.rounds: list[dict[str, Any]] = []
        self.entries: dict[str, dict[str, Any]] = {
            entry.name: {"runner": entry.runner, **entry.facts, "runs": []} for entry in suite.entries
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers.values():
            peer.stop()

    def start(self) -> None:
        """Start every runner, one after another; one that fails is left out."""
        if self.suite.alone:
            return
        for runner in self.suite.runners:
            if any(entry.runner == runner.name for entry in self.suite.entries):
                self._start(runner)

    def _start(self, runner: Runner) -> None:
        say(f"   loading {runner.name}")
        try:
            ensure(runner.environment)
            name = f"{self.suite.name}-{runner.name}"
            peer = Peer(name, runner.environment, runner.script, runner.spec, self._timeout)
            self._peers[runner.name] = peer
            self._facts[runner.name] = peer.ready()
        except (PeerError, InstallError) as error:
            self._fail(runner.name, error)

    def _fail(self, runner: str, error: Exception) -> None:
        say(f"   {runner} cannot be measured: {error}")
        self.failed[runner] = str(error).splitlines()[0].split("; log:")[0]
        if runner in self._peers:
            self._peers.pop(runner).stop()

    def round(self, number: int) -> None:
        """Ask every entry once."""
        before = self._rates.go({})
        order = list(self.suite.entries)
        random.Random(number).shuffle(order)
        for entry in order:
            runs = self.entries[entry.name]["runs"]
            spent = sum(run["seconds"] for run in runs)
            enough = runs and (entry.once or spent + runs[-1]["seconds"] > PATIENCE)
            if entry.runner in self.failed or enough:
                continue
            found = self._ask(entry.runner, entry.asked(number))
            if found is None:
                continue
            runs.append({"round": number, **found})
            say(f"   {entry.name}: {found['seconds']:.3f} s")
        self.rounds.append({"before": before, "after": self._rates.go({})})

    def profile(self) -> None:
        """One more repetition, profiled, of every entry that wants it."""
        for entry in self.suite.entries:
            kept = self.entries[entry.name]
            if not entry.profile or entry.runner in self.failed or not kept["runs"]:
                continue
            typical = median(run["seconds"] for run in kept["runs"])
            found = self._ask(entry.runner, {**entry.asked(self.repeats), "profile": True, "seconds": typical})
            if found is not None:
                kept["profile"] = found["profile"]

    def _ask(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """One repetition of a runner; None: it failed, and is left out from now on."""
        if self.suite.alone:
            self._start(next(runner for runner in self.suite.runners if runner.name == name))
        if name in self.failed:
            return None
        try:
            return self._peers[name].go(asked)
        except PeerError as error:
            self._fail(name, error)
            return None
        finally:
            if self.suite.alone and name in self._peers:
                self._peers.pop(name).stop()

    def result(self) -> dict[str, Any]:
        """JSON values of all there is so far."""
        return {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "workload": dict(self.suite.workload),
            "rounds": self.rounds,
            "runners": self._facts,
            "failed": self.failed,
            "entries": self.entries,
        }


def say(line: str) -> None:
    print(line, flush=True)


def read(path: Path) -> dict[str, Any]:
    """The results so far; empty when there are none. Raises `ValueError` for a damaged file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not a file of results ({error}); delete it and measure again") from error
    return found


def measure(chosen: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Measure the suites, keeping each round; returns what could not be measured, a line each."""
    sizes = QUICK if options.quick else FULL
    repeats = options.repeats
    kept = read(options.results)
    problems = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    say("== prompts and adapters")
    maker = Peer("prepare", "ours", "prepare.py", material_spec(sizes, options.model, repeats), options.timeout)
    try:
        material = maker.ready()
    finally:
        maker.stop()
    rates = Peer("rates", "ours", "rates.py", {"seconds": 0.1 if options.quick else 1.0}, options.timeout)
    try:
        about = rates.ready()
        versions = {**material["versions"], **about["versions"]}
        facts = {**machine(versions), "threads": about["threads"], "dtype": about["dtype"], "model": options.model}
        for whole in suites(sizes, material, about["dtype"]):
            if whole.name not in chosen:
                continue
            suite = whole.without(options.without)
            with Run(suite, rates, repeats, options.timeout) as run:
                say(f"== {suite.name}: {len(suite.entries)} entries, {run.repeats} rounds")
                run.start()
                for number in range(run.repeats):
                    say(f"-- round {number + 1} of {run.repeats}")
                    run.round(number)
                    kept[suite.name] = {**run.result(), "machine": facts, "quick": options.quick}
                    write_json(options.results, kept)
                run.profile()
                kept[suite.name] = {**run.result(), "machine": facts, "quick": options.quick}
                write_json(options.results, kept)
                problems += [f"{suite.name}: {name}: {why}" for name, why in run.failed.items()]
    finally:
        rates.stop()
    return problems


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny sizes and one repetition, kept apart in build/")
    made.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help=f"suites, or patterns of them: {', '.join(NAMES)}"
    )
    made.add_argument("--without", nargs="+", default=[], metavar="NAME", help="entries to leave out, or patterns")
    made.add_argument("--repeats", type=int, default=None, metavar="N", help="rounds; default: 5, with --quick 1")
    made.add_argument("--model", default="smollm2-135m-instruct", help="base model; default: %(default)s")
    made.add_argument(
        "--results", type=Path, default=None, metavar="FILE", help=f"default: {RESULTS.relative_to(ROOT)}"
    )
    made.add_argument("--timeout", type=float, default=7200.0, metavar="S", help="seconds a repetition may take")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when something could not be measured."""
    options = parser().parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.results = options.results or (QUICK_RESULTS if options.quick else RESULTS)
    chosen = [name for name in NAMES if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    unknown = [pattern for pattern in options.only if not fnmatch.filter(NAMES, pattern)]
    if unknown or options.repeats < 1:
        wrong = f"there is no suite {unknown[0]!r}" if unknown else "--repeats must be at least 1"
        print(f"error: {wrong}; suites: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    try:
        with ended_by_sigterm():
            problems = measure(chosen, options)
    except (PeerError, InstallError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; finished rounds are kept in {options.results}", file=sys.stderr)
        return 130
    say(f"kept in {options.results}")
    for problem in problems:
        print(f"not measured: {problem}", file=sys.stderr)
    written = write_performance.main(["--results", str(options.results)])
    return 1 if problems else written


if __name__ == "__main__":
    sys.exit(main())
