"""Who answers a client's prompt, tier by tier: text in, text out, ids and log-probabilities where asked for.

A speaker streams by appending pieces to the list of what was said so far. When it fails half-way, whoever goes on, the
same speaker at another server or the next tier, is given what was said as the beginning of its own answer: nothing
that reached the caller is said twice, and nothing is lost.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from coterie.errors import CoterieError, EngineError
from coterie.inference.attempts import Attempts
from coterie.inference.calls import CallRecord, CallSink
from coterie.inference.fleet import Fleet
from coterie.inference.simulated import simulated_text
from coterie.inference.trust import TierFailedError, UnfitServerError, check_captured
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, Transport, WireReply, WireRequest
from coterie.types import GenerateRequest, Tier

if TYPE_CHECKING:
    from coterie.inference.local.engine import LocalEngine

Message = Mapping[str, Any]
"""An OpenAI chat message; a last one of role "assistant" is gone on with."""

Stream = Callable[[ServerSpec, WireRequest, float], AsyncIterator[str]]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    seed: int
    adapter: str | None = None
    """Served name of an adapter; None: the client's model."""
    capture: bool = False
    """Whether ids and log-probabilities must come back."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def after(self, said: Sequence[str]) -> Ask:
        """The rest of this ask when `said` was said already; pieces count as a token each."""
        if not said:
            return self
        *earlier, last = self.messages
        begun = "".join(said)
        if last.get("role") == "assistant":
            begun = f"{last.get('content') or ''}{begun}"
        else:
            earlier.append(last)
        messages = (*earlier, {"role": "assistant", "content": begun})
        return replace(self, messages=messages, max_tokens=self.max_tokens - len(said))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets back when it asks for more than text."""

    text: str
    tier: Tier
    server: str
    """host:port; empty for tiers inside the process."""
    model: str
    """Who answered, by the name it is served under."""
    finish_reason: str
    prompt_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Of each token, as the server computes them; None where nothing was sampled from a model (simulated)."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    latency_s: float = 0.0

    @property
    def simulated(self) -> bool:
        """Whether nothing generated this."""
        return self.tier is Tier.SIMULATED


class Speaker(Protocol):
    """One tier of a client."""

    @property
    def tier(self) -> Tier: ...

    async def detect(self) -> None:
        """Returns when it can answer. Raises `CoterieError` or `ImportError`."""
        ...

    async def answer(self, ask: Ask) -> Answer: ...

    async def stream(self, ask: Ask, said: list[str]) -> None:
        """Append the answer to `said`, piece by piece, beginning after what is there."""
        ...

    async def close(self) -> None: ...


class RemoteSpeaker:
    """Servers, by one transport."""

    def __init__(
        self,
        tier: Tier,
        make: Callable[[], tuple[Transport, Stream | None]],
        fleet: Fleet,
        calls: CallSink,
        *,
        timeout_s: float,
        goes_on: Callable[[], bool],
        needs: str | None = None,
    ) -> None:
        """
        Args:
            make: makes the transport, and what streams with it (None: an answer comes in one piece), at first use.
            goes_on: whether a call that fails here goes on to another tier.
            needs: module without which the tier is down.
        """
        self.tier = tier
        self._make, self._fleet, self._calls = make, fleet, calls
        self._timeout_s, self._goes_on, self._needs = timeout_s, goes_on, needs
        self._made: tuple[Transport, Stream | None] | None = None

    async def detect(self) -> None:
        """See `Speaker.detect`."""
        if self._needs is not None and find_spec(self._needs) is None:
            raise TierFailedError(f"{self._needs} is not installed; pip install 'coterie[{self.tier}]'")
        await self._transport()
        pool, whys = self._fleet.pool, []
        await pool.start()
        for server in pool.servers():
            try:
                await self._fleet.control.health(server)
                await self._fleet.base(server)
            except ServerFault as fault:
                whys.append(str(fault))
            else:
                if pool.ready:
                    return
                whys.append(f"{server.name}: well, but it takes no calls yet")
        raise TierFailedError("; ".join(whys) or "no servers are configured")

    async def answer(self, ask: Ask) -> Answer:
        """See `Speaker.answer`. Raises `EngineError` where ids are asked for and the server gives none."""

        async def call(server: ServerSpec, remaining_s: float) -> WireReply:
            transport, _ = await self._transport()
            reply = await transport.call(server, await self._wire(server, ask), remaining_s)
            return replace(reply, server=server.name)

        reply = await self._run(ask, call)
        if ask.capture:
            try:
                check_captured(reply, reply.server)
            except UnfitServerError as error:
                raise EngineError(str(error)) from error  # it answers well otherwise: no reason to leave the tier
        return Answer(
            reply.text, self.tier, reply.server, reply.model or ask.adapter or "", reply.finish_reason,
            reply.prompt_ids, reply.token_ids, reply.logprobs, reply.tool_calls, reply.latency_s,
        )  # fmt: skip

    async def stream(self, ask: Ask, said: list[str]) -> None:
        """See `Speaker.stream`. A server that breaks off is followed by another, which goes on."""

        async def call(server: ServerSpec, remaining_s: float) -> WireReply:
            transport, stream = await self._transport()
            begun, rest, started = len(said), ask.after(said), time.perf_counter()
            if rest.max_tokens > 0:
                wire = await self._wire(server, rest)
                if stream is None:
                    said.append((await transport.call(server, wire, remaining_s)).text)
                else:
                    async for piece in stream(server, wire, remaining_s):
                        said.append(piece)  # noqa: PERF401 - told as it comes
            text = "".join(said[begun:])
            took = time.perf_counter() - started
            return WireReply(text, "", completion_tokens=len(said) - begun, server=server.name, latency_s=took)

        await self._run(ask, call)

    async def close(self) -> None:
        """Close the transport; the fleet is the client's."""
        if self._made is not None:
            await self._made[0].close()

    async def _run(self, ask: Ask, call: Callable[[ServerSpec, float], Any]) -> WireReply:
        records = Attempts(self._calls, self.tier, ask.adapter or "base", None, 0, self._goes_on)

        def failed(server: ServerSpec, fault: ServerFault, seconds: float) -> None:
            records.failed(server, fault, seconds)
            if fault.kind in (FaultKind.CONNECTION, FaultKind.MISSING):
                self._fleet.forget(server.name)

        reply: WireReply
        with records:
            reply, queued_s = await self._fleet.pool.run(
                call,
                needs=ask.adapter,
                prefix=zlib.crc32(str(ask.messages[0]).encode("utf-8", "replace")),
                timeout_s=self._timeout_s,
                on_fault=failed,
                weight=float(ask.max_tokens),
                patient=not self._goes_on(),
            )
        records.answered(reply, queued_s, reply.text)
        return reply

    async def _wire(self, server: ServerSpec, ask: Ask) -> WireRequest:
        return WireRequest(
            model=ask.adapter or await self._fleet.base(server),
            messages=ask.messages,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            capture=ask.capture,
            extra=ask.extra,
        )

    async def _transport(self) -> tuple[Transport, Stream | None]:
        if self._made is None:
            try:
                made = await asyncio.to_thread(self._make)  # may import a large package
            except (CoterieError, ImportError) as error:
                raise TierFailedError(str(error)) from error
            self._made = self._made or made
        return self._made


class LocalSpeaker:
    """The engine inside the process, loaded when it is first asked."""

    tier = Tier.LOCAL

    def __init__(self, base: str | None, calls: CallSink) -> None:
        """`base`: an embedded model's name, a directory or a hub id; None: the default, if it is on disk already."""
        self._base, self._calls = base, calls
        self._engine: LocalEngine | None = None
        self._loading: asyncio.Task[LocalEngine] | None = None

    async def detect(self) -> None:
        """See `Speaker.detect`. Loads nothing."""
        if find_spec("torch") is None:
            raise TierFailedError("torch is not installed; pip install torch")
        if self._engine is None:
            await asyncio.to_thread(self._find)

    def _find(self) -> None:
        from coterie.config import BaseConfig
        from coterie.lm.embedded import resolve_base

        resolve_base(self._base or BaseConfig().model, allow_download=False)

    async def answer(self, ask: Ask) -> Answer:
        """See `Speaker.answer`."""
        if ask.adapter is not None:
            raise EngineError(f"the in-process engine of a client holds no adapter {ask.adapter!r}; only servers do")
        if ask.extra:
            raise EngineError(f"the in-process engine of a client knows no {', '.join(sorted(ask.extra))}")
        engine = await self._loaded()
        started = time.perf_counter()
        chat = engine.base.chat
        made = await engine.generate(
            GenerateRequest(
                prompt_ids=_render(chat.tokenizer, ask.messages),
                adapter=None,
                seed=ask.seed,
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                stop_ids=chat.stop_ids,
            )
        )
        text = str(chat.tokenizer.decode(list(made.token_ids), skip_special_tokens=True))
        took = time.perf_counter() - started
        self._calls.call(
            CallRecord(
                self.tier, "", engine.base.path.name, None, len(made.prompt_ids), len(made.token_ids), took, 0.0, "ok",
                text=text[:200],
            )
        )  # fmt: skip
        return Answer(
            text, self.tier, "", engine.base.path.name, made.finish_reason, made.prompt_ids, made.token_ids,
            made.logprobs, latency_s=took,
        )  # fmt: skip

    async def stream(self, ask: Ask, said: list[str]) -> None:
        """See `Speaker.stream`; the answer comes in one piece."""
        rest = ask.after(said)
        if rest.max_tokens > 0:
            said.append((await self.answer(rest)).text)

    async def close(self) -> None:
        """Let go of the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    async def _loaded(self) -> LocalEngine:
        if self._engine is None:
            if self._loading is None or self._loading.get_loop() is not asyncio.get_running_loop():
                self._loading = asyncio.create_task(asyncio.to_thread(self._load))
            try:
                self._engine = await asyncio.shield(self._loading)
            finally:
                if self._loading is not None and self._loading.done():
                    self._loading = None
        return self._engine

    def _load(self) -> LocalEngine:
        from coterie.config import BaseConfig
        from coterie.errors import BaseModelError
        from coterie.inference.local.engine import LocalEngine
        from coterie.lm.base import load_base

        try:
            return LocalEngine(load_base(BaseConfig(model=self._base) if self._base else BaseConfig()))
        except BaseModelError as error:
            raise TierFailedError(str(error)) from error


class SimulatedSpeaker:
    """Made-up answers, labelled. Never goes on with what a model has begun."""

    tier = Tier.SIMULATED

    def __init__(self, calls: CallSink) -> None:
        self._calls = calls

    async def detect(self) -> None:
        """Always there."""

    async def answer(self, ask: Ask) -> Answer:
        """See `Speaker.answer`."""
        text = simulated_text(ask.seed)
        self._calls.call(CallRecord(self.tier, "", "simulated", None, 0, 0, 0.0, 0.0, "ok", text=text))
        return Answer(text, self.tier, "", "simulated", "stop")

    async def stream(self, ask: Ask, said: list[str]) -> None:
        """See `Speaker.stream`. Raises `EngineError` when something real was said before."""
        if said:
            raise EngineError(
                f"the answer broke off after {len(''.join(said))} characters, and no tier is up that could go on"
            )
        said.append((await self.answer(ask)).text)

    async def close(self) -> None: ...


def _render(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """Prompt ids of a chat. Special tokens in the messages are taken out: they must not open or close a message."""
    specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    plain = []
    for message in messages:
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise EngineError("the in-process engine of a client takes messages whose content is text")
        while any(token in text for token in specials):
            for token in specials:
                text = text.replace(token, "")
        plain.append({"role": message.get("role", "user"), "content": text})
    continued = plain[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        plain, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
    )
    return tuple(tokenizer.encode(text, add_special_tokens=False))
