"""What the server needs of whatever samples tokens.

    TokenRequest ──► TokenEngine.run ──► for each token: steering.before() ──► sample ──► steering.after(token)

The engine knows prompts, adapters, temperatures and probabilities; when to stop, what a grammar allows and who is told
are the business of a `Steering`, one for each sequence. Both its methods are called synchronously between the engine's
own steps, so they must be quick and must not wait.

Log-probabilities are those of the processed policy, the one tokens are really drawn from: penalties, bias, the allowed
set, temperature and truncation included (vLLM's `--logprobs-mode processed_logprobs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.errors import EngineError
from coterie.types import AdapterVersion

Bitmask = NDArray[np.uint32]
"""Allowed tokens, (ceil(vocabulary / 32),): token t is allowed when bit t % 32 of word t // 32 is set."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One sequence to sample. The same request with the same seed gives the same tokens whatever else is running."""

    prompt_ids: tuple[int, ...]
    adapter: AdapterVersion | None
    """None: the bare base model."""
    seed: int
    max_tokens: int
    """At most; the steering may end it earlier, and nothing else does: the engine knows no stop tokens."""
    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    top_logprobs: int = 0
    """How many of the most probable tokens to report beside the sampled one."""


@dataclass(frozen=True, slots=True)
class Step:
    """Constraints on one token. At most one of `ids` and `mask` is given; neither: the whole vocabulary."""

    ids: tuple[int, ...] | None = None
    """Allowed tokens, ascending; the form for small sets, where only their logits need computing."""
    mask: Bitmask | None = None
    """Allowed tokens; the form for grammars."""
    bias: Mapping[int, float] | None = None
    """Added to these tokens' logits before temperature; -inf forbids one."""


class NothingAllowedError(EngineError):
    """The constraints of a step contradict each other; the request's doing."""


FREE = Step()
"""No constraint."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token and what the policy thought of it."""

    token_id: int
    logprob: float
    rank: int = 1
    """1 for the most probable."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most probable ones, best first."""


class Steering(Protocol):
    """Decides what one sequence may say next, and is told what it said."""

    def before(self) -> Step:
        """Called once before each token. What it raises ends this sequence only, through `TokenEngine.run`."""
        ...

    def after(self, token: Token) -> bool:
        """Called once after each token; True ends the sequence."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters for /metrics, since the engine was made."""

    cache_usage: float = 0.0
    """Share of the key/value cache that holds something, 0..1."""
    prefix_queries: int = 0
    """Prompt tokens asked for."""
    prefix_hits: int = 0
    """Of these, tokens found in the cache."""


class TokenEngine(Protocol):
    """Samples tokens under adapters that were loaded into it."""

    @property
    def tokenizer(self) -> Any:
        """The base model's fast tokenizer of transformers, with a chat template."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn."""
        ...

    @property
    def vocabulary(self) -> int:
        """Rows of the output head; every token id is below it."""
        ...

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    async def run(self, request: TokenRequest, steering: Steering) -> None:
        """Sample until the steering says so or `max_tokens` is reached. Cancelling the call ends the sequence at once.

        Where a step allows a single token it is taken with log-probability 0 and rank 1, without asking the model.

        Raises:
            EngineError: unknown adapter, or a prompt that does not fit.
            NothingAllowedError: a step allows no token.
        """
        ...

    async def score(self, adapter: AdapterVersion | None, token_ids: tuple[int, ...], top: int) -> tuple[Token, ...]:
        """Every token after the first, with its log-probability after those before it, at temperature 1 and without
        bias; `top` as `TokenRequest.top_logprobs`. Raises `EngineError` as `run` does."""
        ...

    async def load(self, version: AdapterVersion, directory: Path) -> None:
        """Read a PEFT directory and keep it as `version`, a version this engine never saw. Raises `AdapterError`."""
        ...

    async def unload(self, version: AdapterVersion) -> None:
        """Free what `version` holds; nothing runs under it any more and nothing will."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
