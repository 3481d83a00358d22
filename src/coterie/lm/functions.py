"""Element-wise parts of a decoder layer, as few passes over memory as they need, forward and back.

On a processor these parts are bound by memory, and composed of elementary operations they take as long as a third of
the matrix products between them. Each function here keeps what its derivative needs and nothing else, and computes it
in place. Weights of norms are frozen: only activations have gradients. With compiled kernels (`coterie.lm.native`) a
part is one pass; without them it is made of torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.lm.native.kernels import Kernels


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (wide * inverse).mul_(weight).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        weighted = grads[0].float() * weight
        wide = x.float()
        # y = x r w with r = (mean x^2 + eps)^(-1/2): dx = r w g - x r^3 mean(x w g)
        along = torch.linalg.vecdot(weighted, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
        return weighted.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _CompiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inverse = torch.empty(len(rows))
        ctx.kernels, ctx.shape = kernels, x.shape
        ctx.save_for_backward(rows, weight, inverse)
        return kernels.rms_norm(rows, weight, eps, inverse).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        rows, weight, inverse = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape).contiguous()
        return None, ctx.kernels.rms_norm_backward(grad, rows, weight, inverse).view(ctx.shape), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels | None = None) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, computed in float32 (Zhang & Sennrich, 2019).

    Args:
        x: (..., size)
        weight: float32 (size,), frozen.
    """
    if kernels is not None:
        compiled: Tensor = _CompiledRMSNorm.apply(kernels, x, weight, eps)  # type: ignore[no-untyped-call]
        return compiled
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _AddedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, more: Tensor, weight: Tensor, eps: float, known: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inverse = x.new_empty(len(x), dtype=torch.float32)
        if known is None:
            total = torch.empty_like(x)
            out = kernels.add_rms_norm(x, more, weight, eps, total, inverse)
        else:
            total, out = known, kernels.rms_norm(known, weight, eps, inverse)
        ctx.kernels = kernels
        ctx.save_for_backward(total, weight, inverse)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        total, weight, inverse = ctx.saved_tensors
        of_total, of_out = (grad.contiguous() for grad in grads)
        grad = ctx.kernels.rms_norm_backward(of_out, total, weight, inverse, of_total)
        return None, grad, grad, None, None, None


class _KnownSum(torch.autograd.Function):
    """x + more, which was computed before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor, known: Tensor) -> Tensor:
        return known

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], grads[0], None


def add_rms_norm(
    x: Tensor,
    more: Tensor,
    weight: Tensor,
    eps: float,
    kernels: Kernels | None = None,
    known: Tensor | None = None,
    *,
    over: bool = True,
) -> tuple[Tensor, Tensor]:
    """x + more, and `rms_norm` of it; x and more contiguous (n, size).

    The sum is `known` if it was computed before. Without gradients it may be written `over` x.
    """
    if not torch.is_grad_enabled():
        total = x if over else torch.empty_like(x)
        if kernels is not None:
            return total, kernels.add_rms_norm(x, more, weight, eps, total)
        torch.add(x, more, out=total)
        return total, rms_norm(total, weight, eps)
    if kernels is not None:
        compiled: tuple[Tensor, Tensor] = _AddedRMSNorm.apply(kernels, x, more, weight, eps, known)  # type: ignore[no-untyped-call]
        return compiled
    total = x + more if known is None else _KnownSum.apply(x, more, known)  # type: ignore[no-untyped-call]
    return total, rms_norm(total, weight, eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels | None, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0) if kernels is None else kernels.rotate(side_by_side(x), cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        if ctx.kernels is None:
            return None, _turned(grad, cos, sin, -1.0), None, None
        return None, ctx.kernels.rotate(side_by_side(grad), cos, sin, -1.0), None, None


def side_by_side(x: Tensor) -> Tensor:
    """x (n, heads, dim) with the heads of a token side by side: rows may be far apart, within one there are no gaps."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels | None = None) -> Tensor:
    """Rotary position embedding (Su et al., 2021), the halves of a head rotated against each other.

    Args:
        x: (T, heads, dim)
        cos: (T, 1, dim / 2), as is `sin`; both with rows equally far apart.
    """
    out: Tensor = _Rotary.apply(kernels, x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = ctx.kernels.swiglu_backward(grads[0].contiguous(), gate, up)
        return None, of_gate, of_up


def swiglu(gate: Tensor, up: Tensor, kernels: Kernels | None = None) -> Tensor:
    """silu(gate) * up of rows (n, size) (Shazeer, 2020)."""
    if kernels is None:
        return functional.silu(gate) * up
    out: Tensor = _SwiGLU.apply(kernels, gate, up)  # type: ignore[no-untyped-call]
    return out
