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
from typing import Any

import torch
from torch import Tensor

from coterie.config import LearnerConfig
from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Summary


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


class _Chosen(torch.autograd.Function):
    """Log-probabilities of single tokens, and entropies, of rows of logits: nothing else the size of the rows is kept.

    With lp = log softmax(z / T):  dlp_k / dz_i = (delta_ik - p_i) / T,  dH / dz_i = -p_i (lp_i + H) / T
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kernels: Kernels, at: Tensor, tokens: Tensor, temperature: float) -> Any:
        told = kernels.summarise(logits, [temperature] * len(logits))
        ctx.kernels, ctx.told = kernels, told
        ctx.save_for_backward(logits, at, tokens)
        sharpness = 1.0 / temperature
        chosen = (logits[at, tokens].double() - told.most.double()[at]) * sharpness - told.log_z[at]
        return chosen.float(), told.entropy.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        of_chosen, of_entropy = grads
        logits, at, tokens = ctx.saved_tensors
        told: Summary = ctx.told
        asked = torch.zeros(len(logits)).index_add_(0, at, of_chosen)
        alpha = -(asked + of_entropy * told.entropy.float())
        out = ctx.kernels.softmax_backward_(logits, told, alpha, -of_entropy)
        single = (of_chosen * told.sharpness[at]).to(out.dtype)
        out.index_put_((at, tokens), single, accumulate=True)
        return out, None, None, None, None


def chosen(kernels: Kernels, logits: Tensor, at: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 (m,) of `tokens` (m,) in rows `at` (m,) of softmax(logits / temperature), and the
    entropies float32 (n,) of all rows; logits (n, vocabulary), contiguous, of the kernels' dtype, are the caller's last
    use of them: their gradient is written over them."""
    found: tuple[Tensor, Tensor] = _Chosen.apply(logits, kernels, at, tokens, temperature)  # type: ignore[no-untyped-call]
    return found
