"""Reading what `bench.py` measured: medians with their spread, limits at the rates around each repetition, verdicts.

A limit is floating-point operations (or bytes) over the rate measured before and after the same round. A verdict
compares a figure with what is aimed at; nothing in it is typed, so a page cannot say "reached" where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """Repetitions of one figure."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def text(self, digits: int = 2) -> str:
        """ "2.31 (2.25 to 2.40)"; the median alone where there is one repetition."""
        shown = f"{self.median:.{digits}f}"
        if len(self.values) < 2:
            return shown
        return f"{shown} ({min(self.values):.{digits}f} to {max(self.values):.{digits}f})"


@dataclass(frozen=True, slots=True)
class Measured:
    """One entry of a suite."""

    name: str
    data: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]

    @property
    def runs(self) -> Sequence[Run]:
        found: Sequence[Run] = self.data["runs"]
        return found

    def series(self, value: Callable[[Run], float]) -> Series:
        """`value` of every repetition."""
        return Series(tuple(value(run) for run in self.runs))

    @property
    def seconds(self) -> Series:
        return self.series(lambda run: run["seconds"])

    def rate(self, run: Run, kind: str) -> float:
        """Operations or bytes a second ("matmul" or "read") around a repetition."""
        around = self.rounds[run["round"]]
        return fmean((around["before"][kind], around["after"][kind]))

    def limit(self, run: Run, phase: str | None = None, *, separate: bool = False) -> float:
        """Seconds the floating-point operations of a repetition, or of one phase of it, take at best; `separate`: of a
        phase that computes all it needs itself. Before phases handed anything on, that was the same."""
        measured = run if phase is None else run["phases"][phase]
        flops = measured.get("separate_flops", measured["flops"]) if separate else measured["flops"]
        return float(flops / self.rate(run, "matmul"))

    def profile(self, phase: str) -> dict[str, float]:
        """Share of each kind of work in a phase's time, largest first; empty when it was not profiled.

        Profiles that know no kind "adapters" were made when compiled kernels still counted as Python.
        """
        seconds = self.data.get("profile", {}).get(phase, {})
        if "matrix products" in seconds and "adapters" not in seconds:
            seconds = {{"Python": "Python and compiled kernels"}.get(kind, kind): s for kind, s in seconds.items()}
        total = sum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda item: -item[1])
        return {kind: value / total for kind, value in ordered} if total else {}


class SuiteResult:
    """One suite, as it was kept."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.workload: Mapping[str, Any] = data["workload"]
        self.entries = [
            Measured(name, entry, data["rounds"]) for name, entry in data["entries"].items() if entry["runs"]
        ]
        self.failed: Mapping[str, str] = data["failed"]

    def find(self, **facts: Any) -> list[Measured]:
        """The entries of which all `facts` hold."""
        return [e for e in self.entries if all(e.data.get(key) == value for key, value in facts.items())]

    def one(self, **facts: Any) -> Measured | None:
        """The only entry of which all `facts` hold, if there is one."""
        found = self.find(**facts)
        return found[0] if found else None

    def fastest(self, **facts: Any) -> Measured | None:
        """The one of lowest median seconds."""
        return min(self.find(**facts), key=lambda entry: entry.seconds.median, default=None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure beside what is aimed at."""

    what: str
    value: float
    target: float
    at_least: bool
    unit: str = " times"
    bound: str = ""
    """What keeps it there; said only when the target is not reached."""

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def text(self) -> str:
        digits = 1 if self.value >= 10 else 2
        side = "at least" if self.at_least else "at most"
        line = f"{self.what}: {self.value:.{digits}f}{self.unit} (aimed at: {side} {self.target:g})"
        if self.reached:
            return f"- reached: {line}"
        return f"- **not reached**: {line}" + (f"; {self.bound}" if self.bound else "")


def parts(shares: Mapping[str, float], least: float = 0.02) -> str:
    """ "matrix products 61 %, attention 14 %": the kinds that take at least `least` of the time."""
    shown = [f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if share >= least]
    return ", ".join(shown)


def slope(points: Mapping[float, float]) -> float:
    """Least-squares rise of the values by the keys. Raises `ValueError` for fewer than two points."""
    if len(points) < 2:
        raise ValueError("a slope needs two points")
    mean_x, mean_y = fmean(points), fmean(points.values())
    over = sum((x - mean_x) * (y - mean_y) for x, y in points.items())
    return over / sum((x - mean_x) ** 2 for x in points)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
