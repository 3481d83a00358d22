"""Calls that somebody else's agents make, captured so that they can be trained on. Knows no agent framework.

    model settings + messages (+ tools, response format) -> wire_request -> WireRequest
    AgentCalls.ask: Fleet (servers, adapter versions) -> reply with ids and log-probabilities -> CapturedCall
    chat_completion: CapturedCall -> the answer in OpenAI's form, for the agent

Invariants: a captured call has prompt ids, token ids and one log-probability a token, from a server whose
log-probabilities were tried out (`trust`), and the adapter version that made it; what was captured is untouched by what
the agent is shown. Settings that would sample from another distribution than the one reported are refused.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coterie.errors import ConfigError
from coterie.inference.attempts import Attempts
from coterie.inference.calls import CallSink, NoCalls
from coterie.inference.fleet import Fleet
from coterie.inference.trust import Trust, UnfitServerError, check_reply
from coterie.inference.wire import ServerSpec, Transport, WireReply, WireRequest
from coterie.types import AdapterVersion, Tier

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "top_p": (1.0,),
    "top_k": (-1.0, 0.0),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}
"""Settings that change the distribution, and the values at which they do not."""

_OURS = frozenset({"logprobs", "top_logprobs", "extra_body", "stream", "n", "user"})
_WITH_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})
_FINISHED = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})


@dataclass(frozen=True, slots=True)
class CapturedCall:
    """One answer of a model to an agent, with all that training needs."""

    response_id: str
    """Of the answer the agent was given (`ChatCompletion.id`; `ChatAgentResponse.info["id"]` in CAMEL)."""
    request: WireRequest
    """What was asked: messages, tools and constraints (in `extra`), temperature, bias."""
    reply: WireReply
    adapter: AdapterVersion | None
    """Version that answered; None: the base, or an adapter that was asked for by name."""
    queued_s: float
    """Waiting for a server before sending."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.reply.prompt_ids or ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.reply.token_ids or ()

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of each token, temperature, bias and constraints included."""
        return self.reply.logprobs or ()

    @property
    def text(self) -> str:
        return self.reply.text

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """As the server read them out of the answer, well formed or not (`well_formed`)."""
        return self.reply.tool_calls


class AgentCalls:
    """Asks servers on behalf of agents and keeps what came back. Lives in the event loop of its fleet."""

    def __init__(
        self,
        fleet: Fleet,
        transport: Transport,
        *,
        adapter: Callable[[], AdapterVersion | None] | None = None,
        on_call: Callable[[CapturedCall], None] | None = None,
        keep: int = 1024,
        timeout_s: float = 120.0,
        calls: CallSink | None = None,
        tier: Tier = Tier.CAMEL,
    ) -> None:
        """
        Args:
            adapter: says, at every call, which published version answers; None: the base.
            on_call: told of every captured call; then none is kept for `captured`.
            keep: most calls kept for `captured`; older ones are forgotten.
            timeout_s: of one call, waiting for a server included.
            tier: what records of these calls say.
        """
        self._fleet, self._transport = fleet, transport
        self._adapter, self._on_call = adapter, on_call
        self._timeout_s, self._tier = timeout_s, tier
        self._sink: CallSink = calls or NoCalls()
        self._trust = Trust(transport, fleet)
        self._kept: deque[CapturedCall] = deque(maxlen=keep)

    async def ask(self, wire: WireRequest) -> CapturedCall:
        """Have `wire` answered; its model name is replaced by that of the adapter version, or of the base.

        Raises:
            EngineError: no server can answer, one refuses the request (`ServerFault` REJECTED, with its message), or
                its answers cannot be trained on (`UnfitServerError`).
        """
        fleet = self._fleet
        adapter = self._adapter() if self._adapter is not None else None
        name = fleet.name(adapter)

        asked_of: list[ServerSpec] = []

        async def call(server: ServerSpec, remaining_s: float) -> WireReply:
            asked_of[:] = [server]
            if wire.capture:
                await self._trust.need(server)
            asked = replace(wire, model=name or await fleet.base(server))
            reply = replace(await self._transport.call(server, asked, remaining_s), server=server.name)
            if wire.capture:
                check_reply(reply, asked, server.name)
            return reply

        shown = adapter.model_id if adapter is not None else "base"
        with Attempts(self._sink, self._tier, shown, adapter, 0, lambda: False) as records:
            while True:
                try:
                    reply, queued_s = await fleet.pool.run(
                        call,
                        needs=name,
                        prefix=zlib.crc32(str(wire.messages[0]).encode("utf-8", "replace")) if wire.messages else None,
                        timeout_s=self._timeout_s,
                        on_fault=records.failed,
                        weight=float(wire.max_tokens),
                    )
                    break
                except UnfitServerError as error:
                    records.unfit(error.server, error)
                    self._trust.refuse(asked_of[0], str(error))
                    if not fleet.pool.healthy():
                        raise
        records.answered(reply, queued_s, reply.text)
        captured = CapturedCall(f"chatcmpl-{uuid.uuid4().hex}", wire, reply, adapter, queued_s)
        if self._on_call is not None:
            self._on_call(captured)
        else:
            self._kept.append(captured)
        return captured

    def captured(self) -> tuple[CapturedCall, ...]:
        """The calls since this was last asked, oldest first; they are not kept any longer."""
        found = []
        while self._kept:  # a call may be added meanwhile, from another thread
            found.append(self._kept.popleft())
        return tuple(found)

    async def close(self) -> None:
        """Stop looking after servers whose answers were refused. Fleet and transport are their owner's to close."""
        await self._trust.close()


def check_settings(config: Mapping[str, Any], *, capture: bool) -> None:
    """Refuse model settings that cannot be honoured. Raises `ConfigError`."""
    if config.get("stream"):
        raise ConfigError("stream=True: answers are captured whole; leave stream out of model_config_dict")
    if config.get("n") not in (None, 1):
        raise ConfigError(f"n={config['n']}: one answer a call; leave n out of model_config_dict")
    settings = {**config, **(config.get("extra_body") or {})}
    for key, neutral in _NEUTRAL.items():
        value = settings.get(key)
        if capture and value is not None and value not in neutral:
            raise ConfigError(
                f"{key}={value!r}: the answer would be drawn from another distribution than the one its "
                f"log-probabilities are of, and training would be biased; leave {key} out of model_config_dict"
            )
    for key in ("max_tokens", "max_completion_tokens"):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key}={value!r}: must be a whole number of at least 1")


def answer_tokens(config: Mapping[str, Any], otherwise: int) -> int:
    """Most tokens of an answer by these settings."""
    return config.get("max_completion_tokens") or config.get("max_tokens") or otherwise


def wire_request(
    config: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    response_format: Any = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_tokens: int = 512,
    capture: bool = True,
) -> WireRequest:
    """What to send for an agent's call.

    Args:
        config: OpenAI request fields by name; None stands for not given.
        response_format: a pydantic class, or OpenAI's own form; None: that of the config, if any.
        max_tokens: of the answer, where the config says nothing.
        capture: whether the answer is to be trained on.

    Raises:
        ConfigError: settings that cannot be honoured.
    """
    check_settings(config, capture=capture)
    extra: dict[str, Any] = dict(config.get("extra_body") or {})
    known = _OURS | {"temperature", "max_tokens", "max_completion_tokens", "seed", "logit_bias", "tools"}
    for key, value in config.items():
        if value is None or key in known or (key in _WITH_TOOLS and not tools) or (capture and key in _NEUTRAL):
            continue
        extra[key] = value
    wanted = response_format if response_format is not None else extra.get("response_format")
    if wanted is not None:
        extra["response_format"] = _response_format(wanted)
    if tools:
        extra["tools"] = [dict(tool) for tool in tools]
    temperature = config.get("temperature")
    bias = {int(token): float(value) for token, value in (config.get("logit_bias") or {}).items()}
    return WireRequest(
        model="",
        messages=tuple(dict(message) for message in messages),
        max_tokens=answer_tokens(config, max_tokens),
        temperature=1.0 if temperature is None else float(temperature),
        seed=config.get("seed"),
        bias=bias or None,
        capture=capture,
        extra=extra,
    )


def _response_format(wanted: Any) -> Any:
    if not isinstance(wanted, type):
        return wanted
    schema = {"name": wanted.__name__, "schema": wanted.model_json_schema(), "strict": True}  # type: ignore[attr-defined]
    return {"type": "json_schema", "json_schema": schema}


def well_formed(call: Mapping[str, Any]) -> bool:
    """Whether a tool call names a function and has a JSON object as arguments."""
    function = call.get("function") or {}
    try:
        return bool(function.get("name")) and isinstance(json.loads(function.get("arguments") or "{}"), dict)
    except (ValueError, TypeError):
        return False


def chat_completion(captured: CapturedCall) -> dict[str, Any]:
    """The answer as an OpenAI chat completion, without log-probabilities, which nobody reads there.

    Tool calls whose arguments are no JSON object become text: agents crash on them, and a small model makes many.
    """
    reply = captured.reply
    good = [dict(call) for call in reply.tool_calls if well_formed(call)]
    bad = [call for call in reply.tool_calls if not well_formed(call)]
    text = reply.text or "".join(json.dumps(dict(call.get("function") or {}), ensure_ascii=False) for call in bad)
    finish = reply.finish_reason if reply.finish_reason in _FINISHED else "stop"
    if finish == "tool_calls" and not good:
        finish = "stop"
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if good:
        message["tool_calls"] = good
    answered = reply.completion_tokens or len(reply.token_ids or ())
    return {
        "id": captured.response_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": reply.model or captured.request.model or "unknown",
        "choices": [{"index": 0, "finish_reason": finish, "message": message, "logprobs": None}],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": reply.prompt_tokens + answered,
        },
    }
