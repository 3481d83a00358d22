"""The losses, on log-probabilities of sampled tokens.

For policy p with N_p turns in the update, over sampled tokens t with advantage A_t,

    L_p = -(1 / N_p) * sum_t [ surrogate(t) + entropy_bonus * H_t - sum_a coefficient_a * KL_ta ]

Dividing by the number of turns, not by their length, leaves no length bias (Dr. GRPO, Liu et al. 2025). H is the exact
entropy of the sampling policy at t, KL the exact divergence from it to an anchor a (the base, a magnet, the policy
before the update: `coterie.training.anchors`) under the same mask, bias and temperature. The surrogate is

    policy_gradient   A_t * exp(logp - stop_gradient(logp)) * min(ratio_cap, w_t)         Williams 1992
    clipped           min(r A_t, clip(r, 1 - clip_low, 1 + clip_high) A_t)        Schulman et al. 2017

with r = exp(logp - old_logp), and w_t = stop_gradient(r) the truncated importance weight (Ionides 2008) of data that an
older version or another engine sampled; on in-process data of the current version it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.config import LearnerConfig


@dataclass(frozen=True, slots=True)
class TermTensors:
    """Columns of the terms of one head, all float32 (terms,)."""

    old_logprob: Tensor
    gain: Tensor
    loss: Tensor
    count: Tensor


def surrogate(logprob: Tensor, terms: TermTensors, config: LearnerConfig) -> Tensor:
    """The surrogate of each term, summed over its occurrences: (terms,)."""
    log_ratio = logprob - terms.old_logprob
    if config.loss == "policy_gradient":
        weight = log_ratio.detach().exp().clamp(max=config.ratio_cap)
        return (terms.gain + terms.loss) * weight * (logprob - logprob.detach()).exp()
    ratio = log_ratio.exp()
    high = ratio.clamp(max=1 + config.clip_high)
    low = ratio.clamp(min=1 - config.clip_low)
    # for A > 0 the minimum is the ratio capped from above, for A < 0 the ratio held from below
    return terms.gain * high + terms.loss * low


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats of rows of log-probabilities (n, tokens) -> (n,)."""
    return -(logprobs.exp() * logprobs).sum(-1)


def divergence(logprobs: Tensor, anchor: Tensor) -> Tensor:
    """KL(policy || anchor) in nats of rows of log-probabilities (n, tokens) -> (n,)."""
    return (logprobs.exp() * (logprobs - anchor)).sum(-1)


def columns(terms: list[tuple[float, float, float, int]], device: torch.device) -> TermTensors:
    """Tensors of (old_logprob, gain, loss, count) rows."""
    table = torch.tensor(terms, dtype=torch.float32, device=device).reshape(-1, 4)
    return TermTensors(table[:, 0], table[:, 1], table[:, 2], table[:, 3])
