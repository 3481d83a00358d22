"""Products of few rows with frozen matrices, as decoding asks for them.

    y = x W^T + b        x (rows, in), W (out, in), rows few

Matrix libraries are made for many rows. Two things help with few, measured on two AVX2 cores in float32:

- with several threads, the transposed product W x^T is shared out among them better: 1.2 to 1.5 times the rate at 16 to
  64 rows, the same from about a hundred on;
- a matrix brought once into the order the kernel reads it in (oneDNN's): 1.5 to 2.5 times the rate for the output
  matrix, which is wide. That is a second copy, so it is made of matrices up to `MOST_PACKED` bytes only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_ROWS, MOST_ROWS = 12, 96
"""Between these the transposed product is quicker."""
MOST_PACKED = 256 * 2**20


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of (rows, in) without gradients -> (rows, out), contiguous."""
    few = LEAST_ROWS <= len(x) <= MOST_ROWS
    if not few or x.device.type != "cpu" or x.dtype != torch.float32 or torch.get_num_threads() == 1:
        return functional.linear(x, weight, bias)
    out = torch.mm(weight, x.t().contiguous()).t().contiguous()
    return out if bias is None else out.add_(bias)


class OutputMatrix:
    """The matrix (vocabulary, hidden) from hidden states to logits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: Tensor | None = None
        wanted = weight.device.type == "cpu" and weight.dtype == torch.float32
        available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if wanted and available and weight.numel() * 4 <= MOST_PACKED:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), MOST_ROWS)

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 logits (n, vocabulary) of (n, hidden)."""
        if self._packed is None or torch.is_grad_enabled() or len(hidden) > MOST_ROWS:
            return functional.linear(hidden, self.weight).float()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, None, "none", [], "")
        return out
