"""What became of every call: a file of records, and figures by tier and server.

    an engine or client -> CallRecord -> CallLog (calls.jsonl) | CallStatistics | monitor.prometheus | calls.CallLines

A record is one attempt; a call that three servers failed and a fourth answered has four. Success is counted by calls,
not attempts: answered ones over answered ones and those that failed for good. Quantiles are of the latest `KEPT`
answers, so that they say how it is now.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from coterie.errors import RunFolderError
from coterie.inference.calls import CallLines as CallLines
from coterie.inference.calls import CallRecord
from coterie.inference.calls import EachOf as EachOf
from coterie.inference.calls import log_line as log_line
from coterie.monitor.tables import ResultTable
from coterie.scenarios.teamwork import response_quality
from coterie.types import Tier

KEPT = 4096
"""Latencies kept for each tier and server."""
MAX_BYTES = 64 * 2**20
"""Of calls.jsonl before it becomes calls.1.jsonl, which it replaces: twice this at most is on disk."""

CALL_METRICS: dict[str, str] = {
    "calls/<tier>/answered": "Calls answered by the tier.",
    "calls/<tier>/failed": "Calls that failed for good there.",
    "calls/<tier>/fallbacks": "Attempts that failed and were made up for by another server or tier.",
    "calls/<tier>/cancelled": "Calls nobody wanted the answer of any more.",
    "calls/<tier>/success_rate": "answered / (answered + failed); 1 is the aim.",
    "calls/<tier>/latency_p50": "Seconds from sending to the whole answer, median of the latest answers.",
    "calls/<tier>/latency_p90": "The same, 90th percentile.",
    "calls/<tier>/latency_p99": "The same, 99th percentile.",
    "calls/<tier>/queued_mean": "Mean seconds an answered call waited here for a free place at a server.",
    "calls/<tier>/tokens": "Tokens generated.",
    "calls/<tier>/response_quality": "Mean keyword bonus of the texts' beginnings, 0.05 to 0.15; not of being right.",
    "calls/simulated_share": "Share of the answers that were simulated; nothing is learned from those.",
}
"""Every figure of `CallStatistics.metrics`, and how to read it."""

logger = logging.getLogger("coterie.calls")


@dataclass(slots=True)
class Figures:
    """Of one tier, or of one server in it."""

    answered: int = 0
    failed: int = 0
    fallbacks: int = 0
    cancelled: int = 0
    tokens: int = 0
    queued_s: float = 0.0
    quality: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, record: CallRecord) -> None:
        """Count one attempt."""
        match record.outcome:
            case "ok":
                self.answered += 1
                self.tokens += record.completion_tokens
                self.queued_s += record.queued_s
                self.quality += response_quality(record.text)
                self.latencies.append(record.latency_s)
            case "fault":
                self.failed += 1
            case "fallback":
                self.fallbacks += 1
            case "cancelled":
                self.cancelled += 1

    @property
    def success_rate(self) -> float | None:
        """None when no call has ended yet."""
        ended = self.answered + self.failed
        return self.answered / ended if ended else None

    @property
    def response_quality(self) -> float | None:
        """Mean keyword bonus of the answers."""
        return self.quality / self.answered if self.answered else None

    def latency(self, share: float) -> float | None:
        """Seconds below which that share of the latest answers came (nearest rank)."""
        if not self.latencies:
            return None
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


class CallStatistics:
    """Figures by tier and by server. A `CallSink`."""

    def __init__(self) -> None:
        self.tiers: dict[Tier, Figures] = {}
        self.servers: dict[tuple[Tier, str], Figures] = {}

    def call(self, record: CallRecord) -> None:
        """Count one attempt."""
        self.tiers.setdefault(record.tier, Figures()).add(record)
        if record.server:
            self.servers.setdefault((record.tier, record.server), Figures()).add(record)

    def metrics(self) -> dict[str, float]:
        """All figures that were measured, by the names in `CALL_METRICS`."""
        found: dict[str, float] = {}
        for tier, figures in self.tiers.items():
            values = {
                "answered": figures.answered,
                "failed": figures.failed,
                "fallbacks": figures.fallbacks,
                "cancelled": figures.cancelled,
                "success_rate": figures.success_rate,
                "latency_p50": figures.latency(0.5),
                "latency_p90": figures.latency(0.9),
                "latency_p99": figures.latency(0.99),
                "queued_mean": figures.queued_s / figures.answered if figures.answered else None,
                "tokens": figures.tokens,
                "response_quality": figures.response_quality,
            }
            found.update({f"calls/{tier}/{name}": float(value) for name, value in values.items() if value is not None})
        answered = sum(figures.answered for figures in self.tiers.values())
        if answered:
            simulated = self.tiers.get(Tier.SIMULATED, Figures()).answered
            found["calls/simulated_share"] = simulated / answered
        return found

    def table(self) -> ResultTable:
        """A row for each tier, and for each server in it."""
        rows: list[tuple[str | int | float | None, ...]] = []
        for tier, figures in self.tiers.items():
            rows.append(_row(str(tier), figures))
            rows.extend(_row(f"  {name}", of) for (where, name), of in self.servers.items() if where is tier)
        columns = ("tier", "answered", "failed", "fallbacks", "success", "p50 s", "p90 s", "p99 s", "tokens", "quality")
        return ResultTable("Calls", columns, tuple(rows))


def _row(name: str, figures: Figures) -> tuple[str | int | float | None, ...]:
    return (
        name, figures.answered, figures.failed, figures.fallbacks, figures.success_rate, figures.latency(0.5),
        figures.latency(0.9), figures.latency(0.99), figures.tokens, figures.response_quality,
    )  # fmt: skip


class CallLog:
    """calls.jsonl of a run: a JSON object per attempt, without the text. A `CallSink`.

    Bounded: past `max_bytes` the file becomes calls.1.jsonl and a new one begins. Lines are written when `buffered`
    of them have come, and by `flush` and `close`. A disk that is full stops the log, is said once, and stops nothing
    else.
    """

    def __init__(
        self, path: Path, *, max_bytes: int = MAX_BYTES, buffered: int = 64, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds since the epoch.

        Raises:
            RunFolderError: the file cannot be opened.
        """
        self.path, self.previous = path, path.with_name(f"{path.stem}.1{path.suffix}")
        self._max_bytes, self._buffered, self._clock = max_bytes, buffered, clock
        self._lines: list[bytes] = []
        try:
            self._file: BinaryIO | None = path.open("ab")
            self._drop_torn_line()
        except OSError as error:
            raise RunFolderError(f"cannot write {path}: {error.strerror}") from error

    def call(self, record: CallRecord) -> None:
        """Add one attempt."""
        if self._file is None:
            return
        self._lines.append(json.dumps(_entry(record, self._clock()), ensure_ascii=True).encode() + b"\n")
        if len(self._lines) >= self._buffered:
            self.flush()

    def flush(self) -> None:
        """Hand what has come to the operating system."""
        if self._file is None or not self._lines:
            return
        data = b"".join(self._lines)
        self._lines.clear()
        try:
            if self._file.tell() and self._file.tell() + len(data) > self._max_bytes:
                self._file.close()
                os.replace(self.path, self.previous)
                self._file = self.path.open("ab")
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._file = None
            logger.warning("%s: no more calls are recorded: %s", self.path, error.strerror)

    def close(self) -> None:
        """Write the rest. What comes later is dropped."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop_torn_line(self) -> None:
        """Cut what a dying process left after the last newline."""
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 2**16)  # a line is much shorter
            file.seek(start)
            end = file.read().rfind(b"\n")
            if end >= 0 or start == 0:
                file.truncate(start + end + 1)


def read_calls(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a calls.jsonl, the older part first; a torn last line is left out.

    Raises:
        RunFolderError: another line is not what `CallLog` writes.
    """
    for part in (path.with_name(f"{path.stem}.1{path.suffix}"), path):
        try:
            lines = part.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunFolderError(f"cannot read {part}: {error.strerror}") from error
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise RunFolderError(f"{part}, line {number}: not a call; delete the line") from error
            yield entry


def _entry(record: CallRecord, now: float) -> dict[str, Any]:
    return {
        "time": round(now, 3),
        "tier": str(record.tier),
        "server": record.server,
        "model": record.model,
        "adapter": record.adapter.name if record.adapter is not None else None,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "latency_s": round(record.latency_s, 6),
        "queued_s": round(record.queued_s, 6),
        "outcome": record.outcome,
        "fault": record.fault,
    }
