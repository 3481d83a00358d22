"""From logits to tokens; random numbers and choices are those of `coterie.inference.sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from coterie.inference.sampling import Distribution as Distribution
from coterie.inference.sampling import uniform as uniform
from coterie.lm.native.kernels import kernels_for


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


GREEDY = -1.0
"""In place of a uniform number: the likeliest token is taken."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens drawn from rows of logits."""

    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]
    """Of the rows, in nats."""


def draw(logits: Tensor, rows: list[int], uniforms: list[float], temperatures: list[float]) -> Drawn:
    """Draw from softmax(logits / temperature), without gradients.

    Args:
        logits: (n, vocabulary), finite; overwritten.
        rows: the row each of the m draws is from; every row is drawn from.
        uniforms: the number in [0, 1) that decides each draw, or `GREEDY`.
        temperatures: of the rows (n), positive.
    """
    kernels = kernels_for(logits.dtype, logits.device)
    if kernels is not None:
        return Drawn(*kernels.sample(logits.contiguous(), rows, uniforms, temperatures))
    logits = logits.float()
    if any(temperature != 1.0 for temperature in temperatures):
        logits /= torch.tensor(temperatures, device=logits.device)[:, None]
    probs = logits.softmax(-1)
    at = torch.tensor(rows, device=logits.device)
    tokens = sample_vocabulary(probs, at, [max(u, 0.0) for u in uniforms])
    if GREEDY in uniforms:
        greedy = torch.tensor([u == GREEDY for u in uniforms], device=logits.device)
        tokens = torch.where(greedy, logits.argmax(-1).index_select(0, at), tokens)
    chosen = probs[at, tokens].log().tolist()
    firsts = torch.tensor([rows.index(number) for number in range(len(logits))], device=logits.device)
    entropy = vocabulary_entropy(logits, probs, tokens.index_select(0, firsts)).tolist()
    return Drawn(tokens.tolist(), chosen, entropy)


_CHUNK = 256
"""Tokens whose probabilities are summed before one of them is looked for."""


def vocabulary_entropy(logits: Tensor, probs: Tensor, at: Tensor) -> Tensor:
    """Entropy in nats (n,) of rows of finite scaled logits (n, vocabulary) with probabilities `probs`.

    H = log Z - sum p z: one pass over the rows, where -sum p log p takes a logarithm of every entry. `at` (n,) is a
    token of each row that has some probability; log Z = z - log p is read there.
    """
    where = at[:, None]
    log_z = logits.gather(-1, where)[:, 0] - probs.gather(-1, where)[:, 0].log()
    return log_z - torch.bmm(probs[:, None], logits[:, :, None])[:, 0, 0]


def sample_vocabulary(probs: Tensor, rows: Tensor, uniforms: list[float]) -> Tensor:
    """Tokens (m,): the i-th drawn by `uniforms[i]` from row `rows[i]` of probabilities (n, vocabulary).

    By inverse cumulative probability in two levels, chunks first: one pass over the rows, and less rounding than one
    long running sum.
    """
    n, size = probs.shape
    whole = size // _CHUNK * _CHUNK
    chunks = probs[:, :whole].view(n, -1, _CHUNK).sum(-1)
    if whole < size:
        chunks = torch.cat([chunks, probs[:, whole:].sum(-1, keepdim=True)], dim=-1)
    ends = chunks.double().cumsum(-1).index_select(0, rows)
    target = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None] * ends[:, -1:]
    chunk = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    before = torch.where(chunk > 0, ends.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    # the vocabulary's last chunk may be short: columns past its end have no probability
    columns = chunk * _CHUNK + torch.arange(_CHUNK, device=probs.device)[None]
    inside = probs[rows[:, None], columns.clamp(max=size - 1)].double() * (columns < size)
    place = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # rounding may carry the target past the chunk's sum: the last token that has any probability is meant
    last = _CHUNK - 1 - (inside > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    return (chunk * _CHUNK + torch.minimum(place, last))[:, 0]
