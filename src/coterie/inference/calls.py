"""A record of every call that generated something, and where such records go.

    an engine or client -> CallRecord -> CallSink: CallLines (the log), coterie.monitor.calls (file, statistics)

The logger is "coterie.calls". A line names the tier; it is of level INFO, and WARNING where a call failed for good.
That answers are simulated is said loudly by `coterie.inference.tiers`, once, not by every line.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from coterie.types import AdapterVersion, Tier

CallOutcome = Literal["ok", "fault", "fallback", "cancelled"]
"""ok: answered. fault: failed for good. fallback: failed here and went on to another server or tier."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One attempt at one generation."""

    tier: Tier
    server: str
    """host:port; empty for tiers inside the process."""
    model: str
    adapter: AdapterVersion | None
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    """From sending to the whole answer."""
    queued_s: float
    """Waiting for a free place before sending."""
    outcome: CallOutcome
    fault: str = ""
    """The kind of `ServerFault`, or another error's class."""
    text: str = ""
    """The answer, cut to 200 characters; for the log line only."""


class CallSink(Protocol):
    """Is told of every call. Must not block and must not raise."""

    def call(self, record: CallRecord) -> None: ...


class NoCalls:
    """Keeps nothing."""

    def call(self, record: CallRecord) -> None:
        """Does nothing."""


LABELS = {
    Tier.CAMEL: "Camel VLLM生成",
    Tier.HTTP: "HTTP VLLM生成",
    Tier.LOCAL: "本地引擎生成",
    Tier.SIMULATED: "模拟VLLM生成",
}
"""What a log line calls each tier."""

SHOWN = 60
"""Characters of an answer in a log line."""

logger = logging.getLogger("coterie.calls")


class CallLines:
    """A log line per call: "🤖 HTTP VLLM生成: the answer's beginning"."""

    def call(self, record: CallRecord) -> None:
        """Log `record`."""
        level = logging.WARNING if record.outcome == "fault" else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", log_line(record))


class EachOf:
    """Hands every record to several sinks."""

    def __init__(self, *sinks: CallSink) -> None:
        self.sinks: Sequence[CallSink] = sinks

    def call(self, record: CallRecord) -> None:
        """Tell each sink, in order."""
        for sink in self.sinks:
            sink.call(record)


def log_line(record: CallRecord) -> str:
    """The line of one call. Texts come from models: control characters are gone and newlines are spaces."""
    label = LABELS.get(record.tier, str(record.tier))
    if record.outcome == "ok":
        return f"🤖 {label}: {one_line(record.text, SHOWN)}"
    where = f" {one_line(record.server, 80)}" if record.server else ""
    after = {"fallback": " -> 换用下一个", "cancelled": "", "fault": ""}[record.outcome]
    return f"⚠️ {label}{where} {record.outcome}: {one_line(record.fault, 80)}{after}"


def one_line(text: str, limit: int) -> str:
    """`text` on one line, without control characters or marks that reorder it, cut to `limit` characters."""
    # more is looked at than is shown, because some of it may be dropped; a model's whole answer need not be
    head = " ".join("".join(map(_plain, text[: 4 * limit + 64])).split())
    return head if len(head) <= limit else head[: limit - 1] + "…"


def _plain(char: str) -> str:
    category = unicodedata.category(char)
    if char.isspace() or category in ("Zl", "Zp"):
        return " "
    return "" if category in ("Cc", "Cf", "Cs") else char
