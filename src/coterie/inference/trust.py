"""Whether a server's answers can be trained on. Nothing that comes back is believed.

Before its first call, and again after it was unreachable, a server is asked for one token where one is allowed: a
probability other than 1 shows that its log-probabilities are not those of the distribution it samples from. After that
every answer is checked for what cannot be seen in advance.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from coterie.errors import EngineError
from coterie.inference.fleet import Fleet
from coterie.inference.sharing import InFlight
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, Transport, WireReply, WireRequest
from coterie.types import Tier

CANARY_S = 10.0
"""Seconds the canary's call may take."""

FIRST_LOOK_S = 5.0
LAST_LOOK_S = 60.0
"""Seconds between looks at a server that was refused, at first and at most."""

_CANARY_IDS = (5, 7)
"""Two ids every vocabulary has; in raw mode at most one of them can have a log-probability near 0."""
_NEAR = 1e-3
_NOT_ONE = 0.01
_RAW = (
    "its log-probabilities are of the distribution before temperature, bias and allowed tokens, so nothing can be "
    "trained on them; start vLLM with --logprobs-mode processed_logprobs (`coterie serve` needs no flag)"
)


class TierFailedError(EngineError):
    """A tier cannot answer, whatever is asked; another may."""


class UnfitServerError(TierFailedError):
    """A server's answers cannot be used for training; the message says how to start it."""

    def __init__(self, server: str, message: str) -> None:
        super().__init__(f"{server}: {message}")
        self.server = server


class Trust:
    """Which servers have shown, through one transport, that their answers can be trained on."""

    def __init__(self, transport: Transport, fleet: Fleet, *, first_look_s: float = FIRST_LOOK_S) -> None:
        """`first_look_s`: seconds until a refused server is tried again, the first time; doubled each time."""
        self._first_look_s = first_look_s
        self._transport, self._fleet = transport, fleet
        self._trusted: set[str] = set()
        self._trying: InFlight[str, None] = InFlight()
        self._winning_back: dict[str, asyncio.Task[None]] = {}

    async def need(self, server: ServerSpec) -> None:
        """See that `server` gives what training needs. Raises `ServerFault` or `UnfitServerError`."""
        if server.name not in self._trusted:
            await self._trying.do(server.name, partial(self._canary, server))

    def forget(self, server_name: str) -> None:
        """That server may be another one now."""
        self._trusted.discard(server_name)

    def refuse(self, server: ServerSpec, why: str) -> None:
        """Take `server` out of the pool, and look every now and then whether it was mended."""
        self._fleet.refuse(server.name, why)
        self.forget(server.name)
        self.keep_looking()

    def keep_looking(self) -> None:
        """See to it that, in this event loop too, refused servers are looked at now and then."""
        if not self._fleet.refused:
            return
        for server in self._fleet.pool.servers():
            task = self._winning_back.get(server.name)
            idle = task is None or task.done() or task.get_loop() is not asyncio.get_running_loop()
            if server.name in self._fleet.refused and idle:
                self._winning_back[server.name] = asyncio.create_task(self._win_back(server))

    async def close(self) -> None:
        """Look no more."""
        tasks, self._winning_back = self._winning_back, {}
        for task in tasks.values():
            if task.get_loop() is asyncio.get_running_loop() and not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _win_back(self, server: ServerSpec) -> None:
        pause_s = self._first_look_s
        while server.name in self._fleet.refused:
            await asyncio.sleep(pause_s)
            pause_s = min(LAST_LOOK_S, 2 * pause_s)
            with suppress(EngineError):  # why is known already; the next look comes
                await self.need(server)
                self._fleet.readmit(server.name)

    async def _canary(self, server: ServerSpec) -> None:
        prompt: dict[str, Any] = {"prompt_ids": _CANARY_IDS}
        if self._transport.tier is Tier.CAMEL:
            prompt = {"messages": ({"role": "user", "content": "ping"},)}
        model = await self._fleet.base(server)
        for token in _CANARY_IDS:
            wire = WireRequest(model=model, max_tokens=1, seed=0, allowed=(token,), **prompt)
            try:
                reply = await self._transport.call(server, wire, CANARY_S)
            except ServerFault as fault:
                if fault.kind is not FaultKind.REJECTED:
                    raise
                raise UnfitServerError(
                    server.name, f"it refuses what training needs (token ids, allowed_token_ids): {fault}"
                ) from fault
            check_reply(reply, wire, server.name)
            if not reply.logprobs or abs(reply.logprobs[0]) > _NEAR:
                raise UnfitServerError(server.name, _RAW)
        self._trusted.add(server.name)


def check_reply(reply: WireReply, wire: WireRequest, server: str) -> None:
    """Refuse an answer to `wire` that cannot be trained on. Raises `UnfitServerError`."""
    check_captured(reply, server)
    tokens, logprobs = reply.token_ids or (), reply.logprobs or ()
    if wire.prompt_ids and reply.prompt_ids != wire.prompt_ids:
        came = len(reply.prompt_ids or ())
        raise UnfitServerError(server, f"it answered another prompt ({came} tokens for {len(wire.prompt_ids)} sent)")
    if len(tokens) > wire.max_tokens:
        raise UnfitServerError(server, f"{len(tokens)} tokens came back where {wire.max_tokens} were asked for")
    if any(not (math.isfinite(p) and p <= _NEAR) for p in logprobs):
        raise UnfitServerError(server, "a log-probability is above 0 or not a number")
    if wire.allowed is not None and not set(tokens) <= set(wire.allowed):
        raise UnfitServerError(
            server, "a token came back that was not allowed; the server must know allowed_token_ids, as vLLM does"
        )
    if wire.top and wire.allowed is not None:
        allowed_logprobs(reply, wire.allowed, server)


def check_template(reply: WireReply, prompt_ids: tuple[int, ...]) -> None:
    """Refuse an answer to a chat whose prompt is not the one rendered here. Raises `TierFailedError`."""
    if reply.prompt_ids != prompt_ids:
        raise TierFailedError(
            f"{reply.server}: the chat template there made another prompt ({len(reply.prompt_ids or ())} tokens) than "
            f"the one rendered here ({len(prompt_ids)}); serve the same model and template, or use the http tier, "
            "which sends ids"
        )


def check_captured(reply: WireReply, server: str) -> None:
    """Refuse an answer without ids or log-probabilities. Raises `UnfitServerError`."""
    parts = {
        "prompt token ids": reply.prompt_ids,
        "token ids": reply.token_ids,
        "log-probabilities": reply.logprobs,
    }
    missing = [what for what, value in parts.items() if value is None]
    if missing:
        raise UnfitServerError(
            server,
            f"the answer has no {' and no '.join(missing)}, without which nothing can be trained; use vLLM 0.10.2 or "
            "newer (return_token_ids), started with --logprobs-mode processed_logprobs, or `coterie serve`",
        )
    if not reply.token_ids:
        raise UnfitServerError(server, "the answer has no token at all")
    if len(reply.token_ids) != len(reply.logprobs or ()):
        raise UnfitServerError(
            server, f"{len(reply.token_ids)} tokens came back with {len(reply.logprobs or ())} log-probabilities"
        )


def allowed_logprobs(reply: WireReply, allowed: Sequence[int], server: str) -> dict[int, float]:
    """Log-probability of every allowed token at the first step; -inf where the server gave none.

    Raises:
        UnfitServerError: there are none, or they are not of the distribution over `allowed`.
    """
    if not reply.top_logprobs:
        raise UnfitServerError(
            server,
            f"the answer has no log-probabilities of the {len(allowed)} likeliest tokens; start vLLM with "
            f"--max-logprobs {max(20, len(allowed))} or more",
        )
    step: Mapping[int, float] = reply.top_logprobs[0]
    logs = {token: step.get(token, -math.inf) for token in allowed}
    if abs(sum(map(math.exp, logs.values())) - 1.0) > _NOT_ONE:
        raise UnfitServerError(server, _RAW)
    return logs
