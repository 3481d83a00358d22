"""The tokens of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from coterie.inference.fake.policy import FakePolicy, Floats, log_softmax
from coterie.inference.fake.requests import Settings
from coterie.inference.fake.tokens import FakeTokenizer
from coterie.inference.sampling import uniform

LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]
"""What is reported: the distribution sampled from, or that of the model at temperature 1 (vLLM's default)."""


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


@lru_cache(maxsize=4096)
def generate(
    policy: FakePolicy,
    prompt: tuple[int, ...],
    settings: Settings,
    seed: int,
    tokenizer: FakeTokenizer,
    mode: LogprobsMode,
) -> Made:
    """Sample one sequence; the same arguments give the same tokens, so those asked for again are remembered."""
    ends = () if settings.ignore_eos else tokenizer.stop_ids
    made: list[int] = []
    logprobs: list[float] = []
    tops: list[Mapping[int, float]] = []
    texts: list[str] = []
    finish = "length"
    reason: int | str | None = None
    context, bias = list(prompt), dict(settings.bias)
    everything = range(policy.vocabulary)
    while len(made) < settings.max_tokens:
        ids = _may_follow(settings, made, tokenizer.stop_ids) or everything
        if len(made) < settings.min_tokens:
            ids = [token for token in ids if token not in ends and token not in settings.stop_ids] or ids
        steps = _truncated(log_softmax(policy, context, ids, bias, settings.temperature), settings)
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
