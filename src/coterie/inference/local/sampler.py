"""From logits to tokens, by seeded counter-based random numbers.

A request's i-th uniform number depends on (seed, i) alone, so what an episode samples does not depend on what else
is in the batch. Sampling is by inverse cumulative probability.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of stream `seed` (SplitMix64; Steele, Lea & Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The sampling distribution at one point, over a small allowed set."""

    allowed: tuple[int, ...]
    probs: tuple[float, ...]
    logprobs: tuple[float, ...]
    cumulative: tuple[float, ...]
    entropy: float
    """nats"""

    def sample(self, u: float) -> tuple[int, float]:
        """(token, log-probability) for a uniform number u."""
        i = min(bisect_right(self.cumulative, u * self.cumulative[-1]), len(self.allowed) - 1)
        while self.probs[i] == 0.0 and i > 0:
            i -= 1
        return self.allowed[i], self.logprobs[i]

    def greedy(self) -> tuple[int, float]:
        i = max(range(len(self.probs)), key=self.probs.__getitem__)
        return self.allowed[i], self.logprobs[i]


def bias_row(allowed: tuple[int, ...], bias: Mapping[int, float] | None) -> list[float] | None:
    """The bias of each allowed token, or None when there is none."""
    if not bias:
        return None
    row = [bias.get(token, 0.0) for token in allowed]
    return row if any(row) else None


def scaled_logprobs(logits: Tensor, bias: list[float] | None, temperature: float) -> Tensor:
    """float32 log-probabilities (n, allowed) of the sampling policy: softmax((logits + bias) / temperature)."""
    if bias is not None:
        logits = logits + torch.tensor(bias, dtype=logits.dtype, device=logits.device)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return logits.log_softmax(-1)


def distributions(logprobs: Tensor, allowed: tuple[int, ...]) -> list[Distribution]:
    """One `Distribution` for each row of float32 log-probabilities (n, allowed)."""
    probs = logprobs.double().exp()
    entropy = -(probs * logprobs.double().nan_to_num(neginf=0.0)).sum(-1)
    return [
        Distribution(allowed, tuple(p), tuple(lp), tuple(accumulate(p)), h)
        for p, lp, h in zip(probs.tolist(), logprobs.tolist(), entropy.tolist(), strict=True)
    ]


def sample_vocabulary(logprobs: Tensor, uniforms: list[float], greedy: list[bool]) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities for rows of full-vocabulary log-probabilities (n, vocabulary)."""
    cumulative = logprobs.exp().cumsum(-1)
    u = torch.tensor(uniforms, dtype=cumulative.dtype, device=cumulative.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, u, right=True).clamp_(max=logprobs.shape[-1] - 1)
    if any(greedy):
        tokens = torch.where(torch.tensor(greedy, device=tokens.device)[:, None], logprobs.argmax(-1, True), tokens)
    return tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist()
