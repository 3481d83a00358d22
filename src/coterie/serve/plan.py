"""From a request's fields to what is generated: checked against the model and the server's limits.

A `Plan` is one prompt's worth of sampling; the n answers to it differ in their seeds only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.serve.engine import TokenEngine, TokenRequest
from coterie.serve.errors import rejected
from coterie.serve.protocol import SamplingBody
from coterie.serve.settings import ServeSettings
from coterie.types import AdapterVersion

_GREEDY = 1e-5
"""Temperatures below are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one prompt is answered."""

    request: TokenRequest
    """Of the first answer."""
    n: int = 1
    eos_ids: tuple[int, ...] = ()
    """End the answer and are not named as its stop reason; empty with `ignore_eos`."""
    stop_ids: tuple[int, ...] = ()
    """The request's own stop tokens."""
    stops: tuple[str, ...] = ()
    """Stop strings."""
    include_stop: bool = False
    min_tokens: int = 0
    skip_special: bool = True
    bias: Mapping[int, float] | None = None
    allowed: tuple[int, ...] | None = None
    """Ascending."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def answer(self, index: int) -> TokenRequest:
        """The request of the `index`-th answer; as in vLLM its seed is the request's plus the index."""
        return replace(self.request, seed=self.request.seed + index)


def make_plan(
    body: SamplingBody,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    top_logprobs: int,
    adapter: AdapterVersion | None,
    seed: int,
    engine: TokenEngine,
    settings: ServeSettings,
) -> Plan:
    """Check a request against the model.

    Args:
        max_tokens: as the request has it; None where it does not say.
        default_max_tokens: then; None: as many as fit.
        top_logprobs: as asked; -1: the whole vocabulary.
        seed: for requests that bring none.

    Raises:
        ApiError: 400 in vLLM's words.
    """
    context = min(engine.context, settings.max_model_len or engine.context)
    prompt = _truncated(prompt_ids, body.truncate_prompt_tokens, context)
    n = body.n or 1
    if n > settings.max_n:
        raise rejected(f"n must be at most {settings.max_n}, got {n}.", "n")
    if settings.max_tokens is not None and (max_tokens or 0) > settings.max_tokens:
        raise rejected(f"max_tokens must be at most {settings.max_tokens}, got {max_tokens}.", "max_tokens")
    wanted = default_max_tokens if max_tokens is None else max_tokens
    room = context - len(prompt)
    if room < (1 if wanted is None else wanted) or room < 0:
        asked = 1 if wanted is None else wanted
        raise rejected(
            f"This model's maximum context length is {context} tokens. However, you requested {asked} output tokens "
            f"and your prompt contains {len(prompt)} input tokens, for a total of {len(prompt) + asked} tokens. "
            f"Please reduce the length of the input prompt or the number of requested output tokens.",
            "messages" if body.model_fields_set & {"messages"} else "prompt",
        )
    if wanted is None:
        wanted = min(room, settings.max_tokens or room)
    if body.min_tokens > wanted:
        raise rejected(f"min_tokens must be less than or equal to max_tokens={wanted}, got {body.min_tokens}.")
    _check_ids("prompt", prompt, engine.vocabulary)
    _check_ids("stop_token_ids", body.stop_token_ids or (), engine.vocabulary)
    _check_ids("allowed_token_ids", body.allowed_token_ids or (), engine.vocabulary)
    _check_ids("logit_bias", tuple(body.logit_bias or ()), engine.vocabulary)
    temperature = 1.0 if body.temperature is None else body.temperature
    request = TokenRequest(
        prompt_ids=prompt,
        adapter=adapter,
        seed=body.seed if body.seed is not None else seed,
        max_tokens=wanted,
        temperature=0.0 if temperature < _GREEDY else temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        top_logprobs=check_logprobs(top_logprobs, "sample", engine.vocabulary, settings),
    )
    bias = {token: min(100.0, max(-100.0, value)) for token, value in (body.logit_bias or {}).items()}
    return Plan(
        request=request,
        n=n,
        eos_ids=() if body.ignore_eos else engine.stop_ids,
        stop_ids=tuple(body.stop_token_ids or ()),
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        skip_special=body.skip_special_tokens,
        bias=bias or None,
        allowed=None if body.allowed_token_ids is None else tuple(sorted(set(body.allowed_token_ids))),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )


def check_logprobs(wanted: int, kind: str, vocabulary: int, settings: ServeSettings) -> int:
    """How many log-probabilities a token comes with. Raises `ApiError` beyond `settings.max_logprobs`."""
    count = vocabulary if wanted == -1 else wanted
    if count > settings.max_logprobs:
        raise rejected(
            f"Requested {kind} logprobs of {count}, which is greater than max allowed: {settings.max_logprobs}",
            "logprobs" if kind == "sample" else "prompt_logprobs",
        )
    return count


def _truncated(prompt: Sequence[int], keep: int | None, context: int) -> tuple[int, ...]:
    """The last `keep` tokens; -1: as many as the context holds, less one for the answer."""
    if keep is None:
        return tuple(prompt)
    if keep == 0:
        raise rejected("truncate_prompt_tokens must be -1 or at least 1.", "truncate_prompt_tokens")
    return tuple(prompt[-(context - 1 if keep == -1 else keep) :])


def _check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise rejected(
            f"token_id(s) {wrong[:10]} in {name} contain out-of-vocab token ids. Vocabulary size: {vocabulary}", name
        )
