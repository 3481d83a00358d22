"""Products with frozen matrices.

    y = x W^T + b        x (rows, in), W (out, in);        dx = dy W

Matrix libraries are made for many rows, and for matrices that change. Measured on two cores, for the matrices of a 135M
model:

- a matrix brought once into the order a kernel reads it in runs at 1.3 to 3 times the rate from 4 rows on. In float32,
  on processors with fused multiplication, the kernel is our own (`native/products.h`): 1.5 to 2 times the rate of
  oneDNN's up to 64 rows and 1.0 to 1.3 times for hundreds, and a row's result does not depend on the rows beside it.
  Otherwise it is oneDNN's; in bfloat16, where other ways bring the matrix into that order anew each time, for any
  number of rows. That is a second copy of the weights, and for the way back a third, so they are made, at the first
  such product, of models up to `MOST_PACKED` bytes only, and for larger ones of the output matrix if that is small;
- in float32 without such a copy and with several threads, the transposed product W x^T is shared out among them better:
  1.2 to 1.5 times the rate at 16 to 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.lm.native.kernels import Kernels, kernels_for
from coterie.lm.native.operands import Panels

LEAST_ROWS = 4
"""In float32, from these on a matrix packed for oneDNN is quicker, or as quick."""
LEAST_TRANSPOSED, MOST_TRANSPOSED = 12, 96
"""Between these the transposed product is quicker than the plain one."""
MOST_PACKED = 2**30
MOST_PACKED_OUTPUT = 256 * 2**20


def packable(weights: Sequence[Tensor], most: int) -> bool:
    """Whether second copies of `weights` help here and take at most `most` bytes together."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    dtypes = {torch.float32}
    if available and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    return (
        available
        and all(weight.device.type == "cpu" and weight.dtype in dtypes for weight in weights)
        and sum(weight.numel() * weight.element_size() for weight in weights) <= most
    )


class PackedMatrix:
    """One or several frozen matrices with the same input, side by side in the order a kernel reads them in."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """`weights`: (out_i, in) each; they and `biases` are read at the first product."""
        self._parts = tuple(weights), tuple(biases)
        self._ready: Product | None = None
        self._panels: Panels | None = None
        self._kernels = _own(weights[0])
        self._any_rows = weights[0].dtype == torch.bfloat16 or self._kernels is not None

    def suits(self, rows: int) -> bool:
        """Whether a product of so many rows is quicker with it than without."""
        return self._any_rows or rows >= LEAST_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, sum of out_i), without gradients."""
        panels = self.panels()
        if panels is not None and self._kernels is not None:
            return self._kernels.product([x if x.stride(1) == 1 else x.contiguous()], panels)
        if self._ready is None:
            self._ready = _packed(*self._joined())
        return self._ready([x])

    def panels(self) -> Panels | None:
        """The matrices as our kernels read them; None: it is not they that multiply."""
        if self._panels is None and self._kernels is not None:
            self._panels = self._kernels.panels(*self._joined())
        return self._panels

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = self._parts
        bias = None
        if any(b is not None for b in biases):
            every = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat([b.detach() for b in every])
        return _joined(weights), bias


class BackMatrix:
    """The way back through frozen matrices with the same input, side by side: dx = sum of dy_i W_i."""

    def __init__(self, weights: Sequence[Tensor], *, pack: bool) -> None:
        """`weights`: (out_i, in) each. `pack`: a copy of them may be made, at the first product."""
        self._weights = tuple(weights)
        self._pack = pack
        self._ready: Product | None = None
        self._panels: Panels | None = None
        self._kernels = _own(weights[0]) if pack else None

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """(rows, out_i) each -> (rows, in), without gradients."""
        if not self._pack:
            found = grads[0] @ self._weights[0]
            for grad, weight in zip(grads[1:], self._weights[1:], strict=True):
                found.addmm_(grad, weight)
            return found
        panels = self.panels()
        if panels is not None and self._kernels is not None:
            return self._kernels.product([grad if grad.stride(1) == 1 else grad.contiguous() for grad in grads], panels)
        if self._ready is None:
            self._ready = _packed(_joined(self._weights).t(), None)
        return self._ready(grads)

    def panels(self) -> Panels | None:
        """The transposed matrices as our kernels read them; None: it is not they that multiply."""
        if self._panels is None and self._kernels is not None:
            self._panels = self._kernels.panels(_joined(self._weights).t(), None)
        return self._panels


Product = Callable[[Sequence[Tensor]], Tensor]
"""x, in parts (rows, in_i) that lie side by side -> x W^T + b, (rows, out)."""


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    """Products with a copy of `weight` (out, in) and `bias` (out,), of oneDNN."""
    # the number of rows it is asked for decides nothing about the order, as measured
    ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 64)

    def product(parts: Sequence[Tensor]) -> Tensor:
        x = parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=1)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
        return out

    return product


def _own(weight: Tensor) -> Kernels | None:
    """Our kernels, where they multiply such matrices quicker than oneDNN."""
    kernels = kernels_for(weight.dtype, weight.device)
    return kernels if kernels is not None and kernels.panel else None


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

    def __call__(self, hidden: Tensor, known: Tensor | None = None) -> Tensor:
        """Logits (n, vocabulary) of (n, hidden), in its dtype; `known`, if they were computed before."""
        packed = self._packed if self._packed is not None and self._packed.suits(len(hidden)) else None
        if packed is None and known is None:
            return functional.linear(hidden, self.weight)
        if packed is not None and not (torch.is_grad_enabled() and hidden.requires_grad):
            return packed(hidden) if known is None else known
        found: Tensor = _Logits.apply(hidden, packed, self.weight, known)  # type: ignore[no-untyped-call]
        return found


class _Logits(torch.autograd.Function):
    """By a packed matrix, unless they are known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, packed: PackedMatrix | None, weight: Tensor, known: Tensor | None) -> Tensor:
        ctx.weight = weight
        if known is not None:
            return known
        assert packed is not None
        return packed(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] @ ctx.weight, None, None, None
