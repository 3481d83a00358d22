"""Requests to the fake, checked as vLLM checks them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from coterie.errors import EngineError
from coterie.inference.fake.schema import instance, tool_call
from coterie.inference.fake.tokens import FakeTokenizer, tool_text

_UNSUPPORTED = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "use_beam_search": False,
    "bad_words": [],
    "suffix": None,
}
"""Fields of vLLM's that change answers and are not imitated -> the value at which they do not."""


class RefusedError(EngineError):
    """An error answer in vLLM's words."""

    def __init__(
        self, message: str, status: int = 400, type_: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.param = message, status, type_, param


@dataclass(frozen=True, slots=True)
class Settings:
    """What a request asks of sampling and of its answer."""

    n: int
    max_tokens: int
    temperature: float
    seed: int | None
    top_k: int
    top_p: float
    min_p: float
    min_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """The request's own; generation also ends after the model's end tokens, unless `ignore_eos`."""
    ignore_eos: bool
    include_stop: bool
    allowed: tuple[int, ...] | None
    bias: tuple[tuple[int, float], ...]
    """(id, what is added to its logit)"""
    choices: tuple[tuple[int, ...], ...] | None
    """structured_outputs.choice: the answer is one of these, then an end token."""
    written: tuple[int, ...] | None
    """The answer is exactly this, then an end token: under a grammar that leaves nothing else, or said on command."""
    tool: tuple[str, str] | None
    """(name, arguments as JSON) where `written` is a tool call."""
    logprobs: int | None
    """How many alternatives are reported beside the sampled token; None: no log-probabilities at all."""
    prompt_logprobs: int | None
    echo: bool
    stream: bool
    usage: bool
    """Whether a stream ends with a usage event."""
    ids: bool
    ids_as_tokens: bool
    salt: str
    """Of the prefix cache, which answers only prompts of the same salt. Empty: none."""


async def read_json(request: web.BaseRequest) -> dict[str, Any]:
    """The body of a request, an object. Raises `RefusedError`."""
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise RefusedError(f"Invalid JSON: {error}", type_="Bad Request") from error
    if not isinstance(body, dict):
        raise RefusedError("Request body must be a JSON object", type_="Bad Request")
    return body


def read_prompts(
    body: Mapping[str, Any], chat: bool, tokenizer: FakeTokenizer, max_model_len: int
) -> list[tuple[int, ...]]:
    """Prompt ids of each prompt; a chat has one. Raises `RefusedError`."""
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _invalid("messages", "Field required" if messages is None else "must not be empty", messages)
        continued = bool(body.get("continue_final_message"))
        if continued and body.get("add_generation_prompt", True):
            raise RefusedError(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
        prompts = [tuple(tokenizer.chat(messages, continued))]
    else:
        prompt = body.get("prompt")
        if prompt is None or prompt == "" or prompt == []:
            raise RefusedError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = [
            tuple(tokenizer.encode(one)) if isinstance(one, str) else tuple(one)
            for one in (prompt if several else [prompt])
        ]
    for ids in prompts:
        if not all(isinstance(token, int) for token in ids):
            raise _invalid("prompt", "Input should be a valid integer", ids)
        strange = [token for token in ids if not 0 <= token < tokenizer.vocabulary]
        if strange:
            raise RefusedError(f"Token id {max(strange)} is out of vocabulary", param="prompt")
        if len(ids) >= max_model_len:
            raise RefusedError(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
                f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. "
                f"Please reduce the length of the input prompt.",
                param="input_tokens",
            )
    return prompts


def read_settings(
    body: Mapping[str, Any], chat: bool, tokenizer: FakeTokenizer, room: int, rng: random.Random, max_logprobs: int
) -> Settings:
    """The settings of a request that leaves `room` tokens for its answer. `rng` draws what a grammar leaves open.

    Raises `RefusedError`.
    """
    for name, harmless in _UNSUPPORTED.items():
        if body.get(name) not in (None, harmless):
            raise RefusedError(f"The fake server does not imitate {name}={body[name]!r}; leave it out.", param=name)
    echo = bool(body.get("echo")) and not chat
    newer = chat and body.get("max_completion_tokens") is not None
    max_tokens = _integer(body, "max_completion_tokens" if newer else "max_tokens", room if chat else 16)
    temperature = _real(body, "temperature", 1.0)
    n = _integer(body, "n", 1)
    top_k, top_p = _integer(body, "top_k", 0), _real(body, "top_p", 1.0)
    if not 0.0 <= temperature <= 2.0:
        raise RefusedError(f"temperature must be in [0, 2], got {temperature}.", param="temperature")
    if not 0.0 < top_p <= 1.0:
        raise RefusedError(f"top_p must be in (0, 1], got {top_p}.", param="top_p")
    if top_k < -1:
        raise RefusedError(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    if max_tokens < 1 and not (echo and max_tokens == 0):
        raise RefusedError(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    if n < 1 or (n > 1 and temperature == 0):
        why = "n must be 1 when using greedy sampling" if n > 1 else "n must be at least 1"
        raise RefusedError(f"{why}, got {n}.", param="n")
    logprobs = _alternatives(body, chat, max_logprobs)
    prompt_logprobs = None if body.get("prompt_logprobs") is None else _integer(body, "prompt_logprobs", 0)
    if prompt_logprobs is None and echo:
        prompt_logprobs = logprobs
    stream = bool(body.get("stream"))
    if prompt_logprobs and stream:
        raise RefusedError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
    if body.get("stream_options") and not stream:
        raise RefusedError("Stream options can only be defined when `stream=True`.", param="stream_options")
    given = body.get("stop") or ()
    stop = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(text, str) for text in stop):
        raise _invalid("stop", "Input should be a valid string", given)
    choices, written, tool = _grammar(body, tokenizer, rng)
    return Settings(
        n=n,
        max_tokens=min(max_tokens, room),
        temperature=temperature,
        seed=None if body.get("seed") is None else _integer(body, "seed", 0),
        top_k=top_k,
        top_p=top_p,
        min_p=_real(body, "min_p", 0.0),
        min_tokens=_integer(body, "min_tokens", 0),
        stop=stop,
        stop_ids=_token_ids(body, "stop_token_ids", tokenizer.vocabulary) or (),
        ignore_eos=bool(body.get("ignore_eos")),
        include_stop=bool(body.get("include_stop_str_in_output")),
        allowed=_token_ids(body, "allowed_token_ids", tokenizer.vocabulary),
        bias=_bias(body, tokenizer.vocabulary),
        choices=choices,
        written=written,
        tool=tool,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=echo,
        stream=stream,
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
        ids=bool(body.get("return_token_ids")),
        ids_as_tokens=bool(body.get("return_tokens_as_token_ids")),
        salt=_salt(body),
    )


def saying(settings: Settings, text: str, tool: tuple[str, str] | None, tokenizer: FakeTokenizer) -> Settings:
    """The same request, answered with `text`."""
    return replace(settings, written=tuple(tokenizer.encode(text)), tool=tool, choices=None)


def _grammar(
    body: Mapping[str, Any], tokenizer: FakeTokenizer, rng: random.Random
) -> tuple[tuple[tuple[int, ...], ...] | None, tuple[int, ...] | None, tuple[str, str] | None]:
    """(choices, written, tool) of `Settings`."""
    outputs = body.get("structured_outputs") or {}
    if outputs.get("choice"):
        return tuple(tuple(tokenizer.encode(choice)) for choice in outputs["choice"]), None, None
    tools, picked = body.get("tools") or (), body.get("tool_choice")
    if tools and (picked == "required" or isinstance(picked, Mapping)):
        try:
            name, arguments = tool_call(tools, picked, rng)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RefusedError(f"Invalid tools: {error}", param="tools") from error
        return None, tuple(tokenizer.encode(tool_text(name, arguments))), (name, json.dumps(arguments))
    schema = outputs.get("json")
    shape = body.get("response_format") or {}
    if shape.get("type") == "json_schema":
        schema = shape["json_schema"]["schema"]
    elif shape.get("type") == "json_object":
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    if schema is None:
        return None, None, None
    try:
        value = instance(json.loads(schema) if isinstance(schema, str) else schema, rng)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RefusedError(f"Grammar error: {type(error).__name__}: {error}", param="structured_outputs") from error
    return None, tuple(tokenizer.encode(json.dumps(value))), None


def _alternatives(body: Mapping[str, Any], chat: bool, most: int) -> int | None:
    if not chat:
        count = None if body.get("logprobs") is None else _integer(body, "logprobs", 0)
    else:
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise RefusedError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
        count = _integer(body, "top_logprobs", 0) if body.get("logprobs") else None
    if count is not None and count > most:
        raise RefusedError(f"Requested sample logprobs of {count}, which is greater than max allowed: {most}")
    return count


def _token_ids(body: Mapping[str, Any], name: str, vocabulary: int) -> tuple[int, ...] | None:
    ids = body.get(name)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise _invalid(name, "Input should be a valid list of integers", ids)
    if name == "allowed_token_ids" and not ids:
        raise RefusedError("allowed_token_ids is not None and empty!", param=name)
    if any(not 0 <= token < vocabulary for token in ids):
        raise RefusedError(f"{name} contains out-of-vocab token id!", param=name)
    return tuple(sorted(set(ids)))


def _bias(body: Mapping[str, Any], vocabulary: int) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias")
    if not given:
        return ()
    try:
        bias = {int(token): float(value) for token, value in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise _invalid("logit_bias", "Input should be a valid dictionary", given) from error
    strange = [token for token in bias if not 0 <= token < vocabulary]
    if strange:
        raise RefusedError(
            f"token_id(s) {strange} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocabulary}",
            param="logit_bias",
        )
    return tuple(bias.items())


def _salt(body: Mapping[str, Any]) -> str:
    salt = body.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not salt:
        raise RefusedError("Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt")
    if len(salt) > 128 or set(salt) & set("@/\\\0"):
        raise RefusedError(
            "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\\\', or NUL.",
            param="cache_salt",
        )
    return salt


def _integer(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, "Input should be a valid integer", value)
    return value


def _real(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(name, "Input should be a valid number", value)
    return float(value)


def _invalid(name: str, problem: str, given: Any) -> RefusedError:
    """As FastAPI's validation, which repeats what it was given."""
    entry = {"type": "value_error", "loc": f"body.{name}", "msg": problem, "input": given}
    return RefusedError(f"1 validation error:\n  {entry}", type_="Bad Request", param=f"body.{name}")
