"""From logits to tokens; random numbers and choices are those of `coterie.inference.sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from coterie.inference.sampling import Distribution as Distribution
from coterie.inference.sampling import uniform as uniform


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
