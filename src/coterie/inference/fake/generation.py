"""One request to the fake: its settings, checked as vLLM checks them, and its tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from coterie.errors import EngineError
from coterie.inference.fake.policy import FakePolicy, Floats, log_softmax
from coterie.inference.fake.schema import instance, tool_call
from coterie.inference.fake.tokens import FakeTokenizer, tool_text
from coterie.inference.sampling import uniform

LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]
"""What is reported: the distribution sampled from, or that of the model at temperature 1 (vLLM's default)."""

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
    bias: Mapping[int, float] | None
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


@dataclass(frozen=True, slots=True)
class Made:
    """One generated sequence."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Mapping[int, float], ...]
    """For each token, what is reported: the sampled id first, then the likeliest."""
    texts: tuple[str, ...]
    """The text after each token; stop tokens and what follows a stop string are not in it."""
    finish_reason: str
    stop_reason: int | str | None


def generate(
    policy: FakePolicy,
    prompt: Sequence[int],
    settings: Settings,
    seed: int,
    tokenizer: FakeTokenizer,
    mode: LogprobsMode,
) -> Made:
    """Sample one sequence; the same arguments give the same tokens."""
    ends = () if settings.ignore_eos else tokenizer.stop_ids
    made: list[int] = []
    logprobs: list[float] = []
    tops: list[Mapping[int, float]] = []
    texts: list[str] = []
    finish = "length"
    reason: int | str | None = None
    context = list(prompt)
    everything = range(policy.vocabulary)
    while len(made) < settings.max_tokens:
        ids = _may_follow(settings, made, tokenizer.stop_ids) or everything
        if len(made) < settings.min_tokens:
            ids = [token for token in ids if token not in ends and token not in settings.stop_ids] or ids
        steps = _truncated(log_softmax(policy, context, ids, settings.bias, settings.temperature), settings)
        place = _sample(steps, 0.0 if settings.temperature == 0 else uniform(seed, len(made)), settings.temperature)
        token = int(ids[place])
        if settings.logprobs is not None:
            if mode == "raw_logprobs":
                ids, steps = everything, log_softmax(policy, context, everything, None, 1.0)
                place = token
            logprobs.append(float(steps[place]))
            tops.append(_top(ids, steps, place, settings.logprobs))
        made.append(token)
        context.append(token)
        stopped = token in ends or token in settings.stop_ids
        texts.append(tokenizer.decode(made[:-1] if stopped and not settings.include_stop else made))
        if stopped:
            finish, reason = "stop", (None if token in ends else token)
            break
        cut = _stop_string(texts[-1], settings)
        if cut is not None:
            texts[-1], reason = cut
            finish = "stop"
            break
    return Made(tuple(made), tuple(logprobs), tuple(tops), tuple(texts), finish, reason)


def _may_follow(settings: Settings, made: Sequence[int], ends: tuple[int, ...]) -> Sequence[int] | None:
    """Ids a grammar or an allowed set leaves, in ascending order; None: all."""
    place = len(made)
    if settings.written is not None:
        return settings.written[place : place + 1] or ends
    if settings.choices is not None:
        begun = [choice for choice in settings.choices if choice[:place] == tuple(made)]
        following = {choice[place] for choice in begun if len(choice) > place}
        return sorted(following | (set(ends) if any(len(choice) == place for choice in begun) else set()))
    return settings.allowed


def _truncated(steps: Floats, settings: Settings) -> Floats:
    """After top_k, top_p and min_p: what is cut off has probability zero, the rest sums to one."""
    if settings.top_k <= 0 and settings.top_p == 1.0 and settings.min_p == 0.0:
        return steps
    probs = np.exp(steps)
    keep = np.ones(len(steps), dtype=bool)
    order = np.argsort(-steps, kind="stable")
    if 0 < settings.top_k < len(steps):
        keep[order[settings.top_k :]] = False
    if settings.top_p < 1.0:
        before = np.cumsum(probs[order]) - probs[order]
        keep[order[before >= settings.top_p]] = False
    if settings.min_p > 0.0:
        keep &= probs >= settings.min_p * probs.max()
    kept: Floats = np.where(keep, steps - np.log(probs[keep].sum()), -np.inf)
    return kept


def _sample(steps: Floats, u: float, temperature: float) -> int:
    if temperature == 0 or len(steps) == 1:
        return int(np.argmax(steps))
    cumulative = np.cumsum(np.exp(steps))
    return min(int(cumulative.searchsorted(u * cumulative[-1], side="right")), len(steps) - 1)


def _top(ids: Sequence[int], steps: Floats, place: int, count: int) -> Mapping[int, float]:
    found = {int(ids[place]): float(steps[place])}
    if count:
        found.update((int(ids[i]), float(steps[i])) for i in np.argsort(-steps, kind="stable")[:count])
    return {token: max(p, -9999.0) for token, p in found.items()}


def _stop_string(text: str, settings: Settings) -> tuple[str, str] | None:
    """(text up to the first stop string, that string)."""
    found = [(text.find(stop), stop) for stop in settings.stop if stop in text]
    if not found:
        return None
    start, stop = min(found)
    return text[: start + len(stop)] if settings.include_stop else text[:start], stop


# -- reading requests -------------------------------------------------------------------------------------------


def read_prompts(body: Mapping[str, Any], chat: bool, tokenizer: FakeTokenizer, max_model_len: int) -> list[list[int]]:
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
        prompts = [list(tokenizer.chat(messages, continued))]
    else:
        prompt = body.get("prompt")
        if prompt is None or prompt == "" or prompt == []:
            raise RefusedError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = [
            list(tokenizer.encode(one)) if isinstance(one, str) else list(one)
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
    stop = body.get("stop") or ()
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
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
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


def _bias(body: Mapping[str, Any], vocabulary: int) -> Mapping[int, float] | None:
    given = body.get("logit_bias")
    if not given:
        return None
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
    return bias


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
