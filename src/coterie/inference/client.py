"""A client for one prompt at a time: asks the best tier there is, and says which one answered.

    async with VLLMClient("http://localhost:8000", "my-model") as client:
        print(await client.generate("1 + 1 = ?", max_tokens=8), client.tier)

Usable alone: needs no config, no run and no torch. Several urls are one pool of servers. Tiers are tried in the order
given, by default camel -> http -> local -> simulated; see `coterie.inference.ladder` for when a tier is left and used
again, and the logger "coterie.calls" for what was said where. A simulated answer begins with "[simulated]".
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.parse import urlsplit

from coterie.errors import ConfigError, EngineError, nearest
from coterie.inference.calls import CallLines, CallSink, EachOf
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.ladder import Ladder, Rung, TierStatus
from coterie.inference.pool import ServerPool
from coterie.inference.speakers import (
    Answer,
    Ask,
    LocalSpeaker,
    Message,
    RemoteSpeaker,
    SimulatedSpeaker,
    Speaker,
    Stream,
)
from coterie.inference.wire import ServerSpec, Transport, server_spec
from coterie.types import Tier

if TYPE_CHECKING:
    from coterie.inference.camel import CamelTransport

TIERS = ("camel", "http", "local", "simulated")
REMOTE = (Tier.CAMEL, Tier.HTTP)

_CONNECT_S = 1.0


class VLLMClient:
    """Generates text by vLLM-compatible servers, or by what is left when there are none.

    Args:
        url: of a server, "http://host:8000" with or without /v1, or several; None: none.
        model_name: served name to ask for; None: each server's own base model.
        tiers: in order of preference, of "camel", "http", "local" and "simulated".
        api_key: of the servers; never logged.
        camel_models: models made by CAMEL's `ModelFactory`; their servers join those of `url`, and the camel tier
            calls them through these very objects.
        base: model of the local tier, as in `coterie models`; None: the default one, if it is on disk already.
        timeout_s: of one call in one tier, waiting for a server included.
        max_in_flight, policy: see `coterie.inference.pool.ServerPool`.
        calls: also told of every call, beside the log.
        on_change: told when another tier comes into use.
        seed: of the sampling seeds of calls that give none.

    Raises:
        ConfigError: not a server's url, an unknown tier, or no tier that could ever answer.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        model_name: str | None = None,
        *,
        tiers: Sequence[str] = TIERS,
        api_key: str | None = None,
        camel_models: Sequence[Any] = (),
        base: str | None = None,
        timeout_s: float = 120.0,
        max_in_flight: int = 64,
        policy: str = "power_of_two",
        calls: CallSink | None = None,
        on_change: Callable[[str], None] | None = None,
        seed: int = 0,
    ) -> None:
        for tier in tiers:
            if tier not in TIERS:
                raise ConfigError(f"unknown tier {tier!r}{nearest(tier, TIERS)}")
        urls = [url] if isinstance(url, str) else list(url or ())
        self.model_name = model_name
        self._camel_models, self._api_key = tuple(camel_models), api_key
        specs = {spec.name: spec for spec in (server_spec(one, api_key) for one in urls)}
        if self._camel_models:
            specs = {spec.name: spec for spec in _camel_transport(self._camel_models, api_key).servers} | specs
        self._specs = tuple(specs.values())
        control = HttpControl()
        self._pool = ServerPool(self._specs, control, policy=policy, max_in_flight=max_in_flight, seed=seed)
        self._fleet = Fleet(self._pool, control, model=model_name, closing=(control.close,))
        self._sink: CallSink = CallLines() if calls is None else EachOf(CallLines(), calls)
        self._rng = random.Random(seed)
        self._looked = False
        self._timeout_s, self._base = timeout_s, base
        made = [self._speaker(Tier(tier)) for tier in tiers if self._specs or Tier(tier) not in REMOTE]
        self._ladder: Ladder[Speaker] = Ladder(
            [Rung(speaker.tier, speaker, speaker.detect) for speaker in made], on_change=on_change
        )

    def _speaker(self, tier: Tier) -> Speaker:
        if tier is Tier.LOCAL:
            return LocalSpeaker(self._base, self._sink)
        if tier is Tier.SIMULATED:
            return SimulatedSpeaker(self._sink)
        return RemoteSpeaker(
            tier,
            _http if tier is Tier.HTTP else partial(_camel, self._camel_models, self._api_key),
            self._fleet,
            self._sink,
            timeout_s=self._timeout_s,
            goes_on=partial(self._another_after, tier),
            needs="camel" if tier is Tier.CAMEL else None,
        )

    def _another_after(self, tier: Tier) -> bool:
        return self._ladder.another_after(tier)

    # -- asking -------------------------------------------------------------------------------------------------

    @overload
    async def generate(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int = ...,
        temperature: float = ...,
        *,
        seed: int | None = ...,
        adapter: str | None = ...,
        return_tokens: Literal[False] = ...,
        **extra: Any,
    ) -> str: ...

    @overload
    async def generate(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int = ...,
        temperature: float = ...,
        *,
        seed: int | None = ...,
        adapter: str | None = ...,
        return_tokens: Literal[True],
        **extra: Any,
    ) -> Answer: ...

    async def generate(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int = 256,
        temperature: float = 0.7,
        *,
        seed: int | None = None,
        adapter: str | None = None,
        return_tokens: bool = False,
        **extra: Any,
    ) -> str | Answer:
        """Answer a prompt.

        Args:
            prompt: a text, or OpenAI chat messages; a last one of role "assistant" is gone on with.
            max_tokens: of the answer.
            temperature: 0 is greedy.
            seed: of sampling; None: the client's next one.
            adapter: served name of an adapter to answer under.
            return_tokens: return an `Answer` with token ids and log-probabilities instead of its text.
            extra: more fields of the request's body (stop, tools, response_format, …), for servers only.

        Raises:
            EngineError: an impossible request, one the server refuses (its message is told), no tier that can
                answer, or a server that gives no token ids where they are asked for.
        """
        ask = self._ask(prompt, max_tokens, temperature, seed, adapter, return_tokens, extra)
        answer = await self._ladder.run(lambda speaker: speaker.answer(ask))
        self._looked = True
        return answer if return_tokens else answer.text

    async def stream(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int = 256,
        temperature: float = 0.7,
        *,
        seed: int | None = None,
        adapter: str | None = None,
        **extra: Any,
    ) -> AsyncIterator[str]:
        """The answer's pieces as they come; the arguments are those of `generate`.

        A server or tier that fails half-way is followed by another, which goes on after what was said; only a
        simulated answer never does, and `EngineError` is raised instead. The tiers camel and local give one piece.
        """
        ask = self._ask(prompt, max_tokens, temperature, seed, adapter, False, extra)
        said = _Said()
        task = asyncio.ensure_future(self._ladder.run(lambda speaker: speaker.stream(ask, said)))
        task.add_done_callback(lambda _: said.news.set())
        told = 0
        try:
            while True:
                await said.news.wait()
                said.news.clear()
                while told < len(said):
                    told += 1
                    if said[told - 1]:
                        yield said[told - 1]
                if task.done():
                    break
            await task
            self._looked = True
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def _ask(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int,
        temperature: float,
        seed: int | None,
        adapter: str | None,
        capture: bool,
        extra: Mapping[str, Any],
    ) -> Ask:
        messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        if not messages or (isinstance(prompt, str) and not prompt):
            raise EngineError("the prompt is empty")
        if max_tokens < 1:
            raise EngineError(f"max_tokens {max_tokens} must be at least 1")
        if not 0.0 <= temperature < float("inf"):
            raise EngineError(f"temperature {temperature} must be 0 or more, and finite")
        drawn = self._rng.getrandbits(31) if seed is None else seed & 0x7FFFFFFF
        return Ask(messages, max_tokens, temperature, drawn, adapter, capture, extra)

    # -- tiers --------------------------------------------------------------------------------------------------

    @property
    def tier(self) -> Tier:
        """The tier the next call starts at; known after the first call or `detect`."""
        return self._ladder.in_use.tier

    @property
    def connection_available(self) -> bool:
        """Whether a server can be reached. As last found out; before anything was asked, by connecting now (a
        second at most for each server)."""
        if not self._looked:
            return any(map(_listens, self._specs))
        return any(status.up for status in self.status() if status.tier in REMOTE)

    def status(self) -> tuple[TierStatus, ...]:
        """Every tier in order: whether it is up, and why not."""
        return self._ladder.status()

    async def detect(self) -> tuple[TierStatus, ...]:
        """Look at every tier that is not known to be up, now, and return how all of them are."""
        await self._ladder.look_again()
        self._looked = True
        return self.status()

    async def close(self) -> None:
        """Close connections and let go of models. Closing twice is fine."""
        await self._ladder.close()
        for rung in self._ladder.rungs:
            await rung.subject.close()
        await self._fleet.close()

    async def __aenter__(self) -> VLLMClient:
        await self._ladder.start()
        self._looked = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Said(list[str]):
    """The pieces of a stream so far; `news` is set when there is another."""

    def __init__(self) -> None:
        super().__init__()
        self.news = asyncio.Event()

    def append(self, piece: str) -> None:
        super().append(piece)
        self.news.set()


def _http() -> tuple[Transport, Stream | None]:
    transport = HttpTransport()
    return transport, transport.stream


def _camel(models: Sequence[Any], api_key: str | None) -> tuple[Transport, Stream | None]:
    return _camel_transport(models, api_key), None


def _camel_transport(models: Sequence[Any], api_key: str | None) -> CamelTransport:
    from coterie.inference.camel import CamelTransport

    return CamelTransport(models, api_key=api_key)


def _listens(server: ServerSpec) -> bool:
    parts = urlsplit(server.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False
