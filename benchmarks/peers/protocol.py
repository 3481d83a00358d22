"""How a runner talks with `bench.py`: one JSON object a line, over its standard input and output.

    bench.py                          runner
    {"spec": {...}}         ->        loads, repeats the work once to warm up
                            <-        {"event": "ready", "versions": {...}, ...}
    {"go": {...}}           ->        one measured repetition
                            <-        {"event": "result", "seconds": ..., ...}
    end of input            ->        ends

Whatever libraries print to standard output goes to standard error, so that it cannot be taken for an answer. Nothing
but the standard library is imported here: this file runs inside the environment of every peer.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Facts = Mapping[str, Any]
Repetition = Callable[[Facts], Facts]
"""One measured repetition: what `go` asks for -> its result, "seconds" included."""


class Channel:
    """The runner's end."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, facts: Facts) -> None:
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()

    def wait(self, key: str) -> Any | None:
        """What the next line holds under `key`; None when no more comes."""
        line = sys.stdin.readline()
        return json.loads(line)[key] if line.strip() else None


def serve(prepare: Callable[[Facts], tuple[Facts, Repetition]]) -> None:
    """Prepare for the spec, then answer every `go`. An exception is told before it ends the process."""
    channel = Channel()
    try:
        facts, repeat = prepare(channel.wait("spec") or {})
        channel.send("ready", facts)
        while (asked := channel.wait("go")) is not None:
            channel.send("result", repeat(asked))
    except Exception as error:  # noqa: BLE001 - whatever it is, the benchmark must hear of it
        channel.send("error", {"message": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        raise SystemExit(1) from None


def timed(work: Callable[[], Facts]) -> Facts:
    """What `work` says, and the seconds it took."""
    started = time.perf_counter()
    facts = work()
    return {"seconds": time.perf_counter() - started, **facts}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, Python's first."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def warmed(spec: Facts, repeat: Repetition) -> Facts:
    """Where the spec asks for it, one repetition of generation before those that count, on prompts of its own.

    Raises `ValueError` when answers are not as long as they should be.
    """
    if not spec["warm_up"]:
        return {}
    warm = repeat({"set": 0, "adapters": len(spec["adapters"])})
    wanted = len(spec["sets"][0]) * spec["tokens"]
    if warm["answer_tokens"] != wanted:
        raise ValueError(f"{warm['answer_tokens']} tokens were generated instead of {wanted}")
    return {"warm_up": warm}


def leave_out_kernels(spec: Facts) -> None:
    """Coterie's own runners: as on a machine without a C++ compiler, where `kernels` is false."""
    if not spec.get("kernels", True):
        os.environ["COTERIE_KERNELS"] = "0"


def check_ids(expected: list[list[int]], found: list[list[int]]) -> None:
    """Raise `ValueError` unless a peer reads the same prompts as the others, token for token."""
    for number, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        if list(wanted) != list(got):
            raise ValueError(f"prompt {number} is {len(got)} tokens here and {len(wanted)} tokens for the others")
