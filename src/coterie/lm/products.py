"""Products of few rows with frozen matrices, as decoding asks for them.

    y = x W^T + b        x (rows, in), W (out, in), rows few

Matrix libraries are made for many rows. Measured with few, on two AVX2 cores in float32:

- a matrix brought once into the order the kernel reads it in (oneDNN's) runs at 1.3 to 3 times the rate from 4 rows on,
  and as fast as any other at a hundred. That is a second copy of the weights, so it is made, at the first such product,
  of models up to `MOST_PACKED` bytes only, and for larger ones of the output matrix if that is small;
- without such a copy and with several threads, the transposed product W x^T is shared out among them better: 1.2 to
  1.5 times the rate at 16 to 64 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LEAST_ROWS, MOST_ROWS = 4, 128
"""Between these a packed matrix is quicker. Every number of rows costs a kernel made for it, once."""
LEAST_TRANSPOSED, MOST_TRANSPOSED = 12, 96
"""Between these the transposed product is quicker than the plain one."""
MOST_PACKED = 2**30
MOST_PACKED_OUTPUT = 256 * 2**20


def packable(weights: Sequence[Tensor], most: int) -> bool:
    """Whether second copies of `weights` help here and take at most `most` bytes together."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        available
        and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
        and sum(weight.numel() * weight.element_size() for weight in weights) <= most
    )


class PackedMatrix:
    """One or several frozen matrices with the same input, side by side in the order oneDNN reads them in."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """`weights`: (out_i, in) each; they and `biases` are read at the first product."""
        self._parts = tuple(weights), tuple(biases)
        self._ready: tuple[Tensor, Tensor | None] | None = None

    @staticmethod
    def suits(rows: int) -> bool:
        """Whether a product of so many rows is quicker with it than without."""
        return LEAST_ROWS <= rows <= MOST_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, sum of out_i), without gradients."""
        if self._ready is None:
            weights, biases = self._parts
            joined = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
            bias = None
            if any(b is not None for b in biases):
                every = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
                bias = torch.cat([b.detach() for b in every])
            self._ready = torch.ops.mkldnn._reorder_linear_weight(joined, MOST_ROWS // 2), bias
        weight, bias = self._ready
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of (rows, in) without gradients -> (rows, out), contiguous."""
    few = LEAST_TRANSPOSED <= len(x) <= MOST_TRANSPOSED
    if not few or x.device.type != "cpu" or x.dtype != torch.float32 or torch.get_num_threads() == 1:
        return functional.linear(x, weight, bias)
    out = torch.mm(weight, x.t().contiguous()).t().contiguous()
    return out if bias is None else out.add_(bias)


class OutputMatrix:
    """The matrix (vocabulary, hidden) from hidden states to logits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed = PackedMatrix([weight], [None]) if packable([weight], MOST_PACKED_OUTPUT) else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 logits (n, vocabulary) of (n, hidden)."""
        if self._packed is None or torch.is_grad_enabled() or len(hidden) > MOST_ROWS:
            return functional.linear(hidden, self.weight).float()
        return self._packed(hidden)
