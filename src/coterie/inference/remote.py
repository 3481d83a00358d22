"""An engine on servers: `GenerateRequest`s become wire requests, and the answers become `Generation`s.

    free text   one call; the ids and log-probabilities that come back are the turn's
    choices     one call per branching point of the choices' trie, with the allowed ids, their bias and max_tokens 1;
                tokens without an alternative are appended here with log-probability 0, as `LocalEngine` reports them

A call at a branching point asks for the log-probabilities of the whole allowed set, and the token is drawn here with
the request's own seed, by the same numbers as in-process. So episodes that stand at the same point share one call
however many they are, the entropy is exact, and a seed means the same token on any server. Sets of more than `max_top`
tokens are drawn by the server, one call for each request.

Nothing that comes back is believed (`trust`): prompt ids must equal those sent, tokens must be allowed ones, and
log-probabilities of the distribution sampled from, with bias, temperature and allowed set.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from coterie.errors import EngineError
from coterie.inference.attempts import Attempts
from coterie.inference.base import check_request
from coterie.inference.calls import CallSink, NoCalls
from coterie.inference.fleet import Fleet
from coterie.inference.local.choices import TrieNode, build_trie
from coterie.inference.points import Found, KnownPoints, Point, distribution_of, point_of
from coterie.inference.pool import NoServers
from coterie.inference.sampling import uniform
from coterie.inference.sharing import InFlight
from coterie.inference.trust import (
    TierFailedError,
    Trust,
    UnfitServerError,
    allowed_logprobs,
    check_reply,
    check_template,
)
from coterie.inference.wire import (
    FaultKind,
    RejectedRequest,
    ServerFault,
    ServerSpec,
    Transport,
    WireReply,
    WireRequest,
)
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier

MAX_TOP = 20
"""Log-probabilities a vLLM server gives at each step unless started with a larger --max-logprobs."""
DETECT_S = 10.0
"""Seconds a look at a server may take."""

_SEED_MASK = (1 << 31) - 1
_PREFIX_TOKENS = 64


class RemoteEngine:
    """Engine over servers, by one transport: the http tier or the camel tier."""

    def __init__(
        self,
        transport: Transport,
        fleet: Fleet,
        *,
        timeout_s: float = 120.0,
        calls: CallSink | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        max_top: int = MAX_TOP,
        remembered: int = 8192,
    ) -> None:
        """
        Args:
            timeout_s: of one call, waiting for a server included.
            decode: token ids to text, white space kept; a chat transport needs it for answers of several branching
                points, and log lines show choices by it.
            max_top: log-probabilities a server gives at a step at most.
            remembered: branching points whose distributions are kept; 0: none.
        """
        self.tier: Tier = transport.tier
        self.transport, self.fleet = transport, fleet
        self.goes_on: Callable[[], bool] = lambda: False
        """Whether a failed call goes on to another tier; set by `TieredEngine`."""
        self._timeout_s = timeout_s
        self._calls: CallSink = calls or NoCalls()
        self._decode = decode
        self._max_top = max_top
        self._chat = transport.tier is Tier.CAMEL
        self._known = KnownPoints(remembered)
        self._measuring: InFlight[Point, Found] = InFlight()
        self._trust = Trust(transport, fleet)

    # -- the Engine protocol ------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`. The entropy of a token drawn by a server, of which only its own log-probability is
        known, is the one-sample estimate -logprob.

        Raises:
            RequestError: a server rejects what is in the request.
            EngineError: also when no server can answer (`NoServers`, `ServerFault`) or none can be trusted
                (`TierFailedError`).
        """
        check_request(request)
        self.fleet.name(request.adapter)
        born = time.perf_counter()
        try:
            made = await self._made(request)
        except ServerFault as fault:
            if fault.kind is FaultKind.REJECTED:
                raise RejectedRequest.of(fault) from fault
            raise
        return replace(made, latency_s=time.perf_counter() - born)

    async def _made(self, request: GenerateRequest) -> Generation:
        if request.choices is None:
            return await self._text(request)
        root = build_trie(request.choices, request.stop_ids[0] if request.stop_ids else None)
        return await (self._exact(request, root) if request.distribution else self._choice(request, root))

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """See `Engine.publish`. Version 0 needs no directory: it is the base."""
        await self.fleet.publish(version, adapter_dir)
        self._known.forget(version)

    async def rest(self) -> None:
        """Let go of connections, before an event loop ends and another goes on; a later call opens others."""
        await self._trust.close()
        await self.transport.close()
        await self.fleet.rest()

    async def close(self) -> None:
        await self.rest()
        await self.fleet.close()

    async def detect(self) -> None:
        """Find out whether any server can answer and be trusted. Raises `EngineError` saying why none can."""
        fleet, whys = self.fleet, []
        await fleet.pool.start()
        for server in fleet.pool.servers():
            try:
                async with asyncio.timeout(DETECT_S):
                    await fleet.control.health(server)
                    await self._trust.need(server)
            except TimeoutError:
                whys.append(f"{server.name}: no answer within {DETECT_S:g} s")
            except EngineError as error:
                whys.append(str(error))
            else:
                fleet.readmit(server.name)
                if fleet.pool.ready:
                    return
                whys.append(f"{server.name}: well, but it takes no calls yet")
        raise TierFailedError("; ".join(whys) or "no servers are configured")

    # -- choices ------------------------------------------------------------------------------------------------

    async def _choice(self, request: GenerateRequest, root: TrieNode) -> Generation:
        tokens: list[int] = []
        logprobs: list[float] = []
        entropy: list[float] = []
        allowed: list[tuple[int, ...]] = []
        node, server = root, ""
        while not node.final:
            token, logprob, surprise = node.allowed[0], 0.0, 0.0
            if len(node.allowed) > 1:
                point = point_of(request, tuple(tokens), node.allowed)
                if len(node.allowed) <= self._max_top:
                    found, server = await self._distribution(point, request)
                    drawn = found.sample(uniform(request.seed, len(tokens))) if request.temperature else found.greedy()
                    (token, logprob), surprise = drawn, found.entropy
                else:
                    seed = int(uniform(request.seed, len(tokens)) * 2**31)
                    warm = point.temperature if request.temperature else 0.0
                    reply = await self._ask(point, request, seed=seed, temperature=warm)
                    (token,), (logprob,), server = reply.token_ids or (), reply.logprobs or (), reply.server
                    surprise = -logprob
            tokens.append(token)
            logprobs.append(logprob)
            entropy.append(surprise)
            allowed.append(node.allowed)
            node = node.children[token]
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=tuple(tokens), logprobs=tuple(logprobs), allowed=tuple(allowed),
            entropy=tuple(entropy), adapter=request.adapter, tier=self.tier, finish_reason="choice",
            choice=node.choice, server=server,
        )  # fmt: skip

    async def _exact(self, request: GenerateRequest, root: TrieNode) -> Generation:
        """The probability of every choice, from the distribution at every branching point."""
        assert request.choices is not None
        probs = [0.0] * len(request.choices)
        servers: list[str] = []

        async def walk(node: TrieNode, path: tuple[int, ...], mass: float) -> None:
            while len(node.allowed) == 1:
                path, node = (*path, node.allowed[0]), node.children[node.allowed[0]]
            if node.final:
                assert node.choice is not None
                probs[node.choice] = mass
                return
            found, server = await self._distribution(point_of(request, path, node.allowed), request)
            servers.append(server)
            async with asyncio.TaskGroup() as group:
                for token, p in zip(found.allowed, found.probs, strict=True):
                    group.create_task(walk(node.children[token], (*path, token), mass * p))

        try:
            await walk(root, (), 1.0)
        except* EngineError as several:
            raise _first(several) from None
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=(), logprobs=(), allowed=(), entropy=(), adapter=request.adapter,
            tier=self.tier, finish_reason="choice", choice_probs=tuple(probs), server=servers[-1] if servers else "",
        )  # fmt: skip

    async def _distribution(self, point: Point, request: GenerateRequest) -> Found:
        """The distribution at a point, and the server it came from; those who ask at once share a call."""
        found = self._known.get(point)
        if found is None:
            found = await self._measuring.do(point, partial(self._measure, point, request))
            self._known.put(point, found)
        return found

    async def _measure(self, point: Point, request: GenerateRequest) -> Found:
        most = max(2, self._max_top)
        first = replace(point, allowed=point.allowed[:most])
        reply = await self._ask(first, request, top=len(first.allowed))
        logs = allowed_logprobs(reply, first.allowed, reply.server)
        rest = point.allowed[most:]
        if rest:
            # larger sets come in parts that share one token, which ties their scales together
            pivot = max(logs, key=logs.__getitem__)
            parts = [(pivot, *rest[i : i + most - 1]) for i in range(0, len(rest), most - 1)]
            asked = [self._ask(replace(point, allowed=tuple(sorted(part))), request, top=len(part)) for part in parts]
            for part, other in zip(parts, await asyncio.gather(*asked), strict=True):
                found = allowed_logprobs(other, part, other.server)
                logs.update({token: logs[pivot] + found[token] - found[pivot] for token in part[1:]})
            total = math.log(sum(map(math.exp, logs.values())))
            logs = {token: value - total for token, value in logs.items()}
        return distribution_of(point.allowed, logs), reply.server

    # -- free text ----------------------------------------------------------------------------------------------

    async def _text(self, request: GenerateRequest) -> Generation:
        bias = tuple((token, value) for token, value in (request.bias or {}).items() if value)
        point = Point(request.adapter, request.prompt_ids, (), bias, request.temperature)
        reply = await self._ask(
            point, request, seed=request.seed & _SEED_MASK, temperature=request.temperature,
            max_tokens=request.max_tokens,
        )  # fmt: skip
        tokens, logprobs = reply.token_ids or (), reply.logprobs or ()
        stopped = reply.finish_reason == "stop" or tokens[-1] in request.stop_ids
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=tokens, logprobs=logprobs, allowed=None,
            entropy=tuple(max(0.0, -p) for p in logprobs), adapter=request.adapter, tier=self.tier,
            finish_reason="stop" if stopped else "length", server=reply.server,
        )  # fmt: skip

    # -- one call -----------------------------------------------------------------------------------------------

    async def _ask(
        self,
        point: Point,
        request: GenerateRequest,
        *,
        top: int = 0,
        seed: int = 0,
        temperature: float | None = None,
        max_tokens: int = 1,
    ) -> WireReply:
        """Ask any server that can be trusted, and tell the records how it went."""
        fleet, name = self.fleet, self.fleet.name(point.adapter)
        self._trust.keep_looking()
        wire = WireRequest(
            model=name or "",
            max_tokens=max_tokens,
            temperature=point.temperature if temperature is None else temperature,
            seed=seed,
            stop_ids=() if point.allowed else request.stop_ids,
            allowed=point.allowed or None,
            bias=dict(point.bias) or None,
            top=top,
            **self._prompt(point, request),
        )
        shown = point.adapter.model_id if point.adapter is not None else "base"
        records = Attempts(self._calls, self.tier, shown, point.adapter, len(point.prompt_ids), self.goes_on)

        asked_of: list[ServerSpec] = []

        async def call(server: ServerSpec, remaining_s: float) -> WireReply:
            asked_of[:] = [server]
            await self._trust.need(server)
            asked = wire if name else replace(wire, model=await fleet.base(server))
            reply = replace(await self.transport.call(server, asked, remaining_s), server=server.name)
            check_reply(reply, asked, server.name)
            if self._chat:
                check_template(reply, point.prompt_ids)
            return reply

        def failed(server: ServerSpec, fault: ServerFault, seconds: float) -> None:
            records.failed(server, fault, seconds)
            if fault.kind is FaultKind.UNAUTHORIZED:
                self._trust.refuse(server, str(fault))
            elif fault.kind in (FaultKind.CONNECTION, FaultKind.MISSING):
                fleet.forget(server.name)
                self._trust.forget(server.name)

        try:
            with records:
                while True:
                    try:
                        reply, queued = await fleet.pool.run(
                            call,
                            needs=name,
                            prefix=hash(point.prompt_ids[:_PREFIX_TOKENS]),
                            timeout_s=self._timeout_s,
                            on_fault=failed,
                            weight=float(max_tokens),
                            patient=not self.goes_on(),
                        )
                        break
                    except UnfitServerError as error:
                        records.unfit(error.server, error)
                        # through a chat transport the fault may be the transport's, and the server serve others well
                        if self._chat:
                            raise
                        self._trust.refuse(asked_of[0], str(error))
                        if not fleet.pool.healthy():
                            raise
        except NoServers as error:
            if fleet.refused:
                raise TierFailedError(f"{error} ({'; '.join(fleet.refused.values())})") from error
            raise
        records.answered(reply, queued, self._shown(point, reply))
        return reply

    def _prompt(self, point: Point, request: GenerateRequest) -> dict[str, Any]:
        """The prompt as this transport sends it."""
        if not self._chat:
            return {"prompt_ids": point.prompt_ids}
        if not request.messages:
            raise TierFailedError("the camel tier speaks in messages, and this request has none; use the http tier")
        messages = [{"role": role, "content": text} for role, text in request.messages if text]
        begun = point.prompt_ids[len(request.prompt_ids) :]
        if begun:
            if self._decode is None:
                raise TierFailedError("the camel tier needs `decode` to go on with an answer that is begun")
            if messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1]["content"] += self._decode(begun)
        return {"messages": tuple(messages)}

    def _shown(self, point: Point, reply: WireReply) -> str:
        """The answer as a log line shows it; at a branching point, whose token is drawn here, what was likely."""
        if not point.allowed or not reply.top_logprobs or self._decode is None:
            return reply.text
        likely = sorted(reply.top_logprobs[0].items(), key=lambda item: -item[1])[:4]
        return " | ".join(f"{self._decode((token,)).strip()} {math.exp(p):.0%}" for token, p in likely)


def _first(group: BaseExceptionGroup[EngineError]) -> EngineError:
    """One error of a group that may hold groups."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
