"""Bodies of vLLM's API: requests written, answers and errors read. No network here.

    WireRequest -> body_of -> encode -> bytes          (/completions for prompt ids, /chat/completions for messages)
    bytes -> decode -> reply_of -> WireReply           or, at any status but 200, fault_of -> ServerFault

Two rules hold throughout. Nothing is guessed: an answer whose ids, log-probabilities and counts do not fit each other
is a fault, because it would be trained on. And nothing leaks: messages of faults hold no key and no prompt, though
servers put both into their error bodies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireReply, WireRequest

MESSAGE_CHARS = 500
"""Of a server's error message; the rest is cut."""

_IMPOSSIBLE = -9999.0
"""What vLLM writes where a token has probability zero: JSON has no infinity."""

_KINDS = {
    401: FaultKind.UNAUTHORIZED,
    403: FaultKind.UNAUTHORIZED,
    408: FaultKind.TIMEOUT,
    429: FaultKind.OVERLOADED,
    503: FaultKind.OVERLOADED,
}


def path_of(request: WireRequest) -> str:
    """Where a request goes, below the API's url."""
    return "/completions" if request.prompt_ids else "/chat/completions"


def body_of(request: WireRequest, *, stream: bool = False) -> dict[str, Any]:
    """The body of a request.

    Sampling is always from the whole distribution (top_p 1): truncating it biases the training ratio by the kept mass.
    Where tokens are captured every default a server could take from its model's generation_config.json is overruled;
    without capture only what the request sets and what every OpenAI-compatible server knows is sent.

    Raises:
        ValueError: neither prompt ids nor messages.
    """
    body: dict[str, Any] = {"model": request.model}
    if request.prompt_ids:
        body["prompt"] = request.prompt_ids
    elif request.messages:
        body["messages"] = request.messages
        if request.messages[-1].get("role") == "assistant":
            body["continue_final_message"] = True
            body["add_generation_prompt"] = False
    else:
        raise ValueError("the request has neither prompt ids nor messages")
    body["max_tokens"] = request.max_tokens
    body["temperature"] = request.temperature
    body["top_p"] = 1.0
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop_ids:
        body["stop_token_ids"] = request.stop_ids
    if request.allowed is not None:
        body["allowed_token_ids"] = request.allowed
    if request.bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.bias.items()}
    if request.capture:
        body["top_k"] = -1
        body["min_p"] = 0.0
        body["repetition_penalty"] = 1.0
        body["return_token_ids"] = True
    if request.capture or request.top:
        body["return_tokens_as_token_ids"] = True
        if request.prompt_ids:
            body["logprobs"] = request.top
        else:
            body["logprobs"] = True
            body["top_logprobs"] = request.top
    if stream:
        body["stream"] = True
    body.update(request.extra)
    return body


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_plain, allow_nan=False)


def encode(body: Mapping[str, Any]) -> bytes:
    """Compact JSON. Raises `ValueError` or `TypeError` for what JSON cannot hold (infinity, objects)."""
    return _ENCODER.encode(body).encode("ascii")


# -- answers ----------------------------------------------------------------------------------------------------


def decode(server: str, raw: bytes) -> Any:
    """The JSON in a body. Raises `ServerFault` (SERVER)."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ServerFault(FaultKind.SERVER, server, f"answer is not JSON ({len(raw)} bytes): {error}") from error


def reply_of(data: Any, request: WireRequest, server: str, latency_s: float = 0.0) -> WireReply:
    """Read the answer to `request`, of /completions or /chat/completions, already decoded.

    Raises:
        ServerFault: SERVER, when it is no such answer, when its parts do not fit each other, or when the server gave
            the request up half-way (finish_reason "abort": put to sleep or paused).
    """
    try:
        return _read(data, request, server, latency_s)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = f"unreadable answer: {type(error).__name__}: {error}"
        raise ServerFault(FaultKind.SERVER, server, why[:MESSAGE_CHARS]) from error


def _read(data: Any, request: WireRequest, server: str, latency_s: float) -> WireReply:
    choice = data["choices"][0]
    message = choice.get("message")
    finish = choice.get("finish_reason") or ""
    if finish in ("abort", "error"):
        raise ServerFault(FaultKind.SERVER, server, f"the server gave the request up (finish_reason {finish!r})")
    if message is None:
        text, tool_calls = choice["text"], ()
        prompt_ids = choice.get("prompt_token_ids")
    else:
        text, tool_calls = message.get("content") or "", message.get("tool_calls") or ()
        prompt_ids = data.get("prompt_token_ids")
    if not isinstance(text, str):
        raise ValueError("the text of the answer is not a string")
    ids, token_ids = _ids(prompt_ids), _ids(choice.get("token_ids"))
    echo = bool(request.extra.get("echo"))
    logprobs, named, top = _logprobs(choice.get("logprobs"), echo, token_ids is None, request.top > 0)
    prompt_logprobs = _prompt_logprobs(
        choice.get("prompt_logprobs") or data.get("prompt_logprobs"), ids or request.prompt_ids
    )
    if echo:  # then the lists are of the prompt, followed by the answer
        if logprobs is not None and prompt_logprobs is None and request.prompt_ids:
            prompt_logprobs = logprobs[1 : len(request.prompt_ids)]
        logprobs = top = None
    elif token_ids is None:
        token_ids = named
    if logprobs is not None and token_ids is not None and len(logprobs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} token ids but {len(logprobs)} log-probabilities")
    usage = data.get("usage") or {}
    return WireReply(
        text=text,
        finish_reason=finish,
        prompt_ids=ids,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        top_logprobs=top,
        tool_calls=tuple(tool_calls),
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        model=data.get("model") or "",
        server=server,
        latency_s=latency_s,
    )


def _ids(values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not set(map(type, values)) <= {int}:
        raise ValueError("token ids that are not whole numbers")
    return tuple(values)


_Top = tuple[Mapping[int, float], ...]


def _logprobs(
    block: Any, echo: bool, wants_ids: bool, wants_top: bool
) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None, _Top | None]:
    """(log-probability of each token, its id where the name tells it, the likeliest ids at its step); the last two
    only where wanted."""
    if not block:
        return None, None, None
    if "content" in block:
        content = block["content"] or ()
        names = [entry["token"] for entry in content]
        values = [entry["logprob"] for entry in content]
    else:
        content, names, values = None, block["tokens"], block["token_logprobs"]
        if len(values) != len(names):
            raise ValueError(f"{len(names)} tokens but {len(values)} log-probabilities")
    if echo and values and values[0] is None:
        values = [0.0, *values[1:]]  # nothing comes before the first token of a prompt
    logprobs = tuple(map(float, values))
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("a log-probability is not finite")
    if not (wants_ids or wants_top):
        return logprobs, None, None
    ids = tuple(map(_named, names))
    if -1 in ids:
        return logprobs, None, None
    if not wants_top:
        return logprobs, ids, None
    if content is not None:
        steps = [[(other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ()] for entry in content]
    else:
        steps = [list((step or {}).items()) for step in block.get("top_logprobs") or ()]
    top = tuple(
        {**{_named(name): float(p) for name, p in step if p > _IMPOSSIBLE}, token: value}
        for step, token, value in zip(steps, ids, logprobs, strict=True)
    )
    if any(-1 in step for step in top):
        raise ValueError("the likeliest tokens came back as text, not as ids")
    return logprobs, ids, top


def _named(token: str) -> int:
    """The id in "token_id:17"; -1 for a token given as text."""
    return int(token[9:]) if token.startswith("token_id:") else -1


def _prompt_logprobs(steps: Any, ids: Sequence[int] | None) -> tuple[float, ...] | None:
    if not steps:
        return None
    if ids is not None and len(ids) != len(steps):
        raise ValueError(f"{len(ids)} prompt ids but {len(steps)} prompt log-probabilities")
    found = []
    for place, step in enumerate(steps[1:], start=1):
        if ids is None and len(step) > 1:
            return None  # which of them is the prompt's own cannot be told
        entry = step[str(ids[place])] if ids is not None else next(iter(step.values()))
        found.append(float(entry["logprob"]))
    if not all(map(math.isfinite, found)):
        raise ValueError("a log-probability of the prompt is not finite")
    return tuple(found)


# -- errors -----------------------------------------------------------------------------------------------------


def fault_of(
    server: ServerSpec, status: int, headers: Mapping[str, str], raw: bytes, request: WireRequest | None = None
) -> ServerFault:
    """What an answer other than 200 means.

    `raw`: the body, as far as it was read. `request`: what was asked, so that the server's message cannot repeat it.
    """
    try:
        said, of_model = _message(json.loads(raw))
    except (ValueError, RecursionError):
        text = raw.decode("utf-8", "replace").strip()
        said, of_model = ("" if text.startswith("<") else text), False  # a proxy's HTML page says nothing
    said = _clean(said, server, request)
    kind = _KINDS.get(status) or (FaultKind.SERVER if status >= 500 else FaultKind.REJECTED)
    if status == 404 and of_model:
        kind = FaultKind.MISSING
    elif status == 404:
        said = f"no such address there ({said or 'not found'}); does its url point at an OpenAI-compatible API?"
    elif kind is FaultKind.UNAUTHORIZED:
        hint = "it refused the key" if server.api_key else "it wants a key"
        said = f"{said or 'unauthorized'}: {hint}; name the environment variable that holds it in api_key_env"
    elif 300 <= status < 400:
        said = f"it redirects to {headers.get('Location', 'elsewhere')}; give that url instead"
    retry = retry_after_s(headers) if kind is FaultKind.OVERLOADED else 0.0
    return ServerFault(kind, server.name, said or "no message", status=status, retry_after_s=retry)


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float:
    """Seconds a server asks to be left alone: Retry-After as seconds or as an HTTP date (RFC 9110, 10.2.3).

    A date is compared with the server's own Date where it sends one, so that clocks need not agree. 0 when there is
    none or it cannot be read.
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value)
            since = parsedate_to_datetime(headers["Date"]) if "Date" in headers else now or datetime.now(UTC)
            seconds = (until - since).total_seconds()
        except (ValueError, TypeError):  # TypeError: one of the two dates has no time zone
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _message(data: Any) -> tuple[str, bool]:
    """(what an error body says, whether it comes from the API itself rather than from a missing route)."""
    if not isinstance(data, dict):
        return "", False
    detail = data.get("detail")
    if isinstance(detail, list):  # FastAPI: {"loc": [...], "msg": ..., "input": what was sent}
        entries = [entry for entry in detail if isinstance(entry, dict)]
        lines = [f"{'.'.join(map(str, entry.get('loc', ())))}: {entry.get('msg', '')}" for entry in entries]
        return "; ".join(lines), False
    if detail is not None:
        return str(detail), False
    inner = data.get("error")
    if isinstance(inner, dict):
        said = str(inner.get("message") or inner.get("type") or "")
    elif inner is not None:
        said = str(inner)
    else:
        said = str(data.get("message") or "")
    return said, bool(said) and said.strip().lower() not in ("not found", "404: not found", "file not found")


def _clean(said: str, server: ServerSpec, request: WireRequest | None) -> str:
    """Without key and prompt, on one line, cut."""
    if server.api_key:
        said = said.replace(server.api_key, "[key]")
    if request is not None:
        if request.prompt_ids:
            said = said.replace(str(list(request.prompt_ids)), "[prompt]")
        for text in _texts(request):
            said = said.replace(text, "[prompt]").replace(repr(text)[1:-1], "[prompt]")
    # pydantic repeats what was sent, in one of two ways
    said = re.sub(r"'input': [^\n]*", "'input': …", said)
    said = re.sub(r"input_value=.*?, input_type", "input_value=…, input_type", said, flags=re.DOTALL)
    said = " ".join(said.split())
    return said if len(said) <= MESSAGE_CHARS else said[:MESSAGE_CHARS] + "…"


def _texts(request: WireRequest) -> list[str]:
    """The texts of a request's messages, long ones first; a word or two says nothing."""
    found = []
    for message in request.messages:
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        found += [part.get("text") for part in parts if isinstance(part, Mapping)]
    return sorted((text for text in found if isinstance(text, str) and len(text) > 2), key=len, reverse=True)
