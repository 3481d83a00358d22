"""Servers in memory, for tests of what asks them: exact, without a network, and wrong in one way at a time.

    servers = MemoryServers("one", "two")
    engine = servers.engine()                                  # a RemoteEngine over them
    servers.plan["one"] = [ServerFault(FaultKind.TIMEOUT, "one", "slow")]   # what its next calls raise

Their model is the public fake's (`coterie.inference.fake`), so probabilities can be recomputed.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.inference.calls import CallRecord
from coterie.inference.fake import ByteTokenizer, FakePolicy, distribution
from coterie.inference.fleet import Fleet, Probe
from coterie.inference.pool import ServerPool
from coterie.inference.remote import RemoteEngine
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireReply, WireRequest, server_spec
from coterie.types import AdapterVersion, Tier

BASE = "base-model"


class Records:
    """A `CallSink` that keeps everything."""

    def __init__(self) -> None:
        self.kept: list[CallRecord] = []

    def call(self, record: CallRecord) -> None:
        self.kept.append(record)

    @property
    def outcomes(self) -> list[tuple[str, str, str]]:
        return [(r.server, r.outcome, r.fault) for r in self.kept]


class MemoryServers:
    """Transport, control and publisher in one, over servers that answer alike."""

    def __init__(self, *names: str, tier: Tier = Tier.HTTP) -> None:
        self.tier = tier
        self.specs = tuple(server_spec(f"http://{name}") for name in names or ("one",))
        self.tokenizer = ByteTokenizer()
        self.raw: set[str] = set()
        """Servers whose log-probabilities are of the whole vocabulary at temperature 1."""
        self.plan: dict[str, list[ServerFault]] = defaultdict(list)
        """By server: what its next generations raise."""
        self.ill: set[str] = set()
        """Servers whose health is bad."""
        self.change: Callable[[WireReply], WireReply] = lambda reply: reply
        """Applied to every answer but the canary's."""
        self.gate: asyncio.Event | None = None
        """Where set: answers wait for it."""
        self.asked: list[tuple[str, WireRequest]] = []
        """Every generation that was asked for, the canary's included."""
        self.loaded: dict[str, str] = {}
        self.closed = 0

    # -- Transport

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        self.asked.append((server.name, request))
        if self.plan[server.name]:
            raise self.plan[server.name].pop(0)
        if self.gate is not None:
            await self.gate.wait()
        if request.model != BASE and request.model not in self.loaded:
            raise ServerFault(FaultKind.MISSING, server.name, f"no model {request.model}", status=404)
        reply = self._generate(server, request)
        return reply if is_canary(request) else self.change(reply)

    async def stream(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> Any:
        reply = await self.call(server, request, timeout_s)
        for letter in reply.text:
            yield letter

    async def close(self) -> None:
        self.closed += 1

    def _generate(self, server: ServerSpec, request: WireRequest) -> WireReply:
        prompt = request.prompt_ids
        if not prompt:
            continued = request.messages[-1].get("role") == "assistant"
            prompt = tuple(self.tokenizer.chat(request.messages, continued))
        policy, rng = self.policy(request.model), random.Random(request.seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        tops: list[Mapping[int, float]] = []
        finish = "length"
        while len(tokens) < request.max_tokens:
            context = [*prompt, *tokens]
            logs = distribution(
                policy, context, allowed=request.allowed, bias=request.bias, temperature=request.temperature
            )
            likeliest = sorted(logs, key=lambda token: -logs[token])
            token = likeliest[0] if request.temperature == 0 else rng.choices([*logs], map(math.exp, logs.values()))[0]
            told = distribution(policy, context) if server.name in self.raw else logs
            tokens.append(token)
            logprobs.append(told[token])
            tops.append({t: told[t] for t in sorted(told, key=lambda t: -told[t])[: request.top]})
            if token in request.stop_ids:
                finish = "stop"
                break
        return WireReply(
            text=self.tokenizer.decode(tokens),
            finish_reason=finish,
            prompt_ids=prompt,
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            top_logprobs=tuple(tops) if request.top else None,
            model=request.model,
            latency_s=0.25,
        )

    def policy(self, name: str) -> FakePolicy:
        return FakePolicy(0, self.tokenizer.vocabulary, self.loaded.get(name, ""))

    # -- ServerControl

    async def models(self, server: ServerSpec) -> tuple[str, ...]:
        return (BASE, *self.loaded)

    async def load_adapter(self, server: ServerSpec, name: str, path: str) -> None:
        self.loaded[name] = path

    async def unload_adapter(self, server: ServerSpec, name: str) -> None:
        self.loaded.pop(name, None)

    async def health(self, server: ServerSpec) -> None:
        if server.name in self.ill:
            raise ServerFault(FaultKind.CONNECTION, server.name, "refused")

    async def metrics(self, server: ServerSpec) -> Mapping[str, float]:
        return {}

    # -- Publisher

    async def publish(self, version: AdapterVersion, directory: Path, probe: Probe | None) -> object:
        self.loaded[self.name(version)] = str(directory)
        return None

    def name(self, version: AdapterVersion) -> str:
        return version.name.replace("@", "-")

    # -- what is built on it

    def fleet(self, **fields: Any) -> Fleet:
        """Without regular looks: only calls and `detect` ask how servers are."""
        pool = ServerPool(self.specs, self, policy="round_robin", poll_every_s=3600.0)
        return Fleet(pool, self, self, **fields)

    def engine(self, calls: Records | None = None, fleet: Fleet | None = None, **fields: Any) -> RemoteEngine:
        return RemoteEngine(self, fleet or self.fleet(), calls=calls, **{"timeout_s": 2.0, **fields})

    @property
    def generations(self) -> list[tuple[str, WireRequest]]:
        """What was asked for but the canary."""
        return [(name, request) for name, request in self.asked if not is_canary(request)]


def is_canary(request: WireRequest) -> bool:
    return request.allowed is not None and len(request.allowed) == 1


def fault(kind: FaultKind, server: str = "one", **fields: Any) -> ServerFault:
    return ServerFault(kind, server, f"planned {kind}", **fields)


def without(reply: WireReply, *fields: str) -> WireReply:
    return replace(reply, **dict.fromkeys(fields))
