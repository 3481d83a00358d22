"""The records of one call that may take several attempts: which outcome each had is known only by what comes next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from coterie.errors import EngineError
from coterie.inference.calls import CallRecord, CallSink
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireReply
from coterie.types import AdapterVersion, Tier

_SHOWN = 200


class Attempts:
    """Tells `calls` of every attempt of one call, each once: those another followed as "fallback", a last one that
    failed as "fault", or as "fallback" too where the call goes on to another tier.

    The call is made inside `with`: an `EngineError` that leaves it, or its being cancelled, is its end.
    """

    def __init__(
        self,
        calls: CallSink,
        tier: Tier,
        model: str,
        adapter: AdapterVersion | None,
        prompt_tokens: int,
        goes_on: Callable[[], bool],
    ) -> None:
        """`prompt_tokens`: where the caller knows it, else 0. `goes_on`: whether another tier would be asked."""
        self._calls, self._tier = calls, tier
        self._model, self._adapter, self._prompt_tokens = model, adapter, prompt_tokens
        self._goes_on = goes_on
        self._started = time.perf_counter()
        self._pending: tuple[str, str, float] | None = None
        """Server, fault and seconds of the last failed attempt."""

    def failed(self, server: ServerSpec, fault: ServerFault, seconds: float) -> None:
        """An attempt failed; what `ServerPool.run` takes as on_fault."""
        self._next(server.name, str(fault.kind), seconds)

    def unfit(self, server: str, error: EngineError) -> None:
        """An answer came that cannot be used."""
        self._next(server, type(error).__name__, time.perf_counter() - self._started)

    def answered(self, reply: WireReply, queued_s: float, text: str) -> None:
        """The call is answered."""
        self._flush("fallback")
        self._calls.call(
            CallRecord(
                self._tier, reply.server, self._model, self._adapter,
                prompt_tokens=self._prompt_tokens or reply.prompt_tokens,
                completion_tokens=len(reply.token_ids) if reply.token_ids is not None else reply.completion_tokens,
                latency_s=reply.latency_s, queued_s=queued_s, outcome="ok", text=text[:_SHOWN],
            )
        )  # fmt: skip

    def __enter__(self) -> Attempts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, EngineError):
            self._given_up(error)
        elif isinstance(error, asyncio.CancelledError):
            self._cancelled()

    def _given_up(self, error: EngineError) -> None:
        """No attempt answered, and this tier makes no other."""
        if self._pending is None:
            self._pending = ("", type(error).__name__, time.perf_counter() - self._started)
        refused = isinstance(error, ServerFault) and error.kind is FaultKind.REJECTED
        self._flush("fallback" if self._goes_on() and not refused else "fault")

    def _cancelled(self) -> None:
        """Who asked no longer wants the answer."""
        self._flush("fallback")
        self._pending = ("", "cancelled", time.perf_counter() - self._started)
        self._flush("cancelled")

    def _next(self, server: str, fault: str, seconds: float) -> None:
        self._flush("fallback")
        self._pending = (server, fault, seconds)

    def _flush(self, outcome: Literal["fault", "fallback", "cancelled"]) -> None:
        if self._pending is None:
            return
        (server, fault, seconds), self._pending = self._pending, None
        self._calls.call(
            CallRecord(
                self._tier, server, self._model, self._adapter, prompt_tokens=self._prompt_tokens,
                completion_tokens=0, latency_s=seconds, queued_s=0.0, outcome=outcome, fault=fault,
            )
        )  # fmt: skip
