"""A record of every call that generated something, and where such records go."""

from __future__ import annotations

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
