"""Linear layers of the frozen base that add the updates of the routed adapters.

    y = x W^T + (alpha / rank) * (x A^T) B^T        A (rank, in), B (out, rank)      LoRA, Hu et al. 2021

Invariant: a token's gradient reaches exactly the adapter of its range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coterie.lm.products import PackedMatrix, frozen_linear
from coterie.lm.route import Route


class _LoRALinear(torch.autograd.Function):
    """Base linear layer plus each segment's low-rank update; saves x and the (T, rank) products only."""

    @staticmethod
    def forward(ctx, x, weight, bias, segments, *leaves):  # type: ignore[no-untyped-def]
        out = nn.functional.linear(x, weight, bias)
        inner = []
        for (adapter, start, end), a, b in zip(segments, leaves[0::2], leaves[1::2], strict=True):
            h = x[start:end] @ a.to(x.dtype).t()
            out[start:end].addmm_(h, b.to(x.dtype).t(), alpha=adapter.scaling)
            inner.append(h)
        ctx.segments = segments
        ctx.save_for_backward(x, weight, *leaves, *inner)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        n = len(ctx.segments)
        x, weight, *rest = ctx.saved_tensors
        leaves, inner = rest[: 2 * n], rest[2 * n :]
        need_x = ctx.needs_input_grad[0]
        grad_x = grad @ weight if need_x else None
        grads: list[Tensor | None] = []
        for i, (adapter, start, end) in enumerate(ctx.segments):
            a, b = leaves[2 * i], leaves[2 * i + 1]
            g = grad[start:end]
            # thin products in the two layouts that matrix libraries are fast at (up to five times here)
            grad_h = nn.functional.linear(g, b.to(g.dtype).t().contiguous()).mul_(adapter.scaling)
            grads.append((grad_h.t() @ x[start:end]).to(a.dtype))
            grads.append((inner[i].t() @ g).t().mul(adapter.scaling).to(b.dtype))
            if grad_x is not None:
                grad_x[start:end].addmm_(grad_h, a.to(g.dtype))
        return grad_x, None, None, None, *grads


class BankLinear(nn.Module):
    """A frozen linear layer of the base that adds the routed adapters' updates."""

    def __init__(self, linear: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name = name
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)"""
        if not torch.is_grad_enabled():
            out = frozen_linear(x, self.weight, self.bias)
            self.route.add_updates(x, [(self.name, out)])
            return out
        segments = self.route.segments
        if not segments:
            return nn.functional.linear(x, self.weight, self.bias)
        leaves = [leaf for adapter, _, _ in segments for leaf in (adapter.a[self.name], adapter.b[self.name])]
        trained: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, segments, *leaves
        )
        return trained


class Siblings:
    """Linear layers that read the same input: one product where no gradient is wanted and the rows are few."""

    def __init__(self, linears: Sequence[nn.Module], *, pack: bool) -> None:
        """`linears`: `nn.Linear` or `BankLinear`. `pack`: a second copy of their weights may be made."""
        self._linears = tuple(linears)
        self._sizes = [int(linear.out_features) for linear in self._linears]  # type: ignore[arg-type]
        self._adapted = [
            (place, linear.name) for place, linear in enumerate(self._linears) if isinstance(linear, BankLinear)
        ]
        self._route = next((linear.route for linear in self._linears if isinstance(linear, BankLinear)), None)
        self._packed: PackedMatrix | None = None
        if pack:
            weights = [linear.weight for linear in self._linears]
            self._packed = PackedMatrix(weights, [linear.bias for linear in self._linears])  # type: ignore[arg-type,misc]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """(tokens, in) -> (tokens, out_i) each; they may be slices of one tensor."""
        if self._packed is None or torch.is_grad_enabled() or not self._packed.suits(len(x)):
            return [linear(x) for linear in self._linears]
        out: tuple[Tensor, ...] = torch.split(self._packed(x), self._sizes, dim=1)
        if self._route is not None:
            self._route.add_updates(x, [(name, out[place]) for place, name in self._adapted])
        return out
