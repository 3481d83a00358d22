"""Linear layers of the frozen base that add the updates of the routed adapters.

    y = x W^T + (alpha / rank) * (x A^T) B^T        A (rank, in), B (out, rank)      LoRA, Hu et al. 2021

Layers that read the same input are computed together. Gradients of A and B are added to the adapters' own as the
backward pass comes by: autograd sees only x and y.

Invariant: a token's gradient reaches exactly the adapter of its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.lm.native.decoding import Group
from coterie.lm.native.operands import Outer
from coterie.lm.native.way_back import BackGroup
from coterie.lm.products import BackMatrix, PackedMatrix, frozen_linear
from coterie.lm.route import Route


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
        return Siblings([self], pack=False)(x)[0]


class Siblings:
    """Linear layers that read the same input."""

    def __init__(self, linears: Sequence[nn.Module], *, pack: bool) -> None:
        """`linears`: `nn.Linear` or `BankLinear`. `pack`: further copies of their weights may be made."""
        self._linears = tuple(linears)
        self.weights: list[Tensor] = [linear.weight for linear in self._linears]  # type: ignore[misc]
        self._biases: list[Tensor | None] = [linear.bias for linear in self._linears]  # type: ignore[misc]
        self.sizes = [len(weight) for weight in self.weights]
        self.adapted = [
            (place, linear.name) for place, linear in enumerate(self._linears) if isinstance(linear, BankLinear)
        ]
        """(place among the layers, name) of those that have adapters."""
        self.route = next((linear.route for linear in self._linears if isinstance(linear, BankLinear)), None)
        self._packed = PackedMatrix(self.weights, self._biases) if pack else None
        self._back = BackMatrix(self.weights, pack=pack)

    def __call__(self, x: Tensor, known: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """(tokens, in) -> (tokens, out_i) each; they may be slices of one tensor. They are `known` if they were
        computed before, adapters included, and gradients are wanted: only what the way back needs is computed then."""
        if not torch.is_grad_enabled():
            outs = self.products(x)
            if self.route is not None:
                self.route.add_updates(x, [(name, outs[place]) for place, name in self.adapted])
            return outs
        segments = self.route.segments if self.route is not None else ()
        if not segments and not x.requires_grad:
            return self.products(x) if known is None else known
        # autograd asks for a reason to come back here even where x, an embedding, needs no gradient
        reason = segments[0][0].a[self.adapted[0][1]] if segments else None
        found: tuple[Tensor, ...] = _Adapted.apply(x, reason, self, self.route, known)  # type: ignore[no-untyped-call]
        return found

    def group(self) -> Group | None:
        """The layers for whole-layer kernels; None: it is not our kernels that multiply here."""
        panels = self._packed.panels() if self._packed is not None else None
        if panels is None:
            return None
        return Group(panels, self.weights[0].shape[1], tuple(self.sizes), tuple(self.adapted))

    def back_group(self) -> BackGroup | None:
        """The same for the way back."""
        panels = self._back.panels()
        return None if panels is None else BackGroup(panels, tuple(self.adapted))

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """What the layers make of x without adapters, without gradients."""
        if self._packed is not None and self._packed.suits(len(x)):
            return torch.split(self._packed(x), self.sizes, dim=1)
        return [frozen_linear(x, weight, bias) for weight, bias in zip(self.weights, self._biases, strict=True)]

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient at x, given those at what `products` made of it."""
        return self._back(grads)


class _Adapted(torch.autograd.Function):
    """Sibling layers with the routed adapters; keeps x and the (tokens, rank) products only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        reason: Tensor | None,
        siblings: Siblings,
        route: Route | None,
        known: Sequence[Tensor] | None,
    ) -> Any:
        outs = tuple(siblings.products(x) if known is None else known)
        adapted = [(name, outs[place]) for place, name in siblings.adapted]
        ctx.siblings, ctx.segments, ctx.compiled = siblings, (), None
        inner: list[Tensor] = []
        if route is not None and adapted:
            ctx.segments, ctx.compiled = route.one_by_one, route.compiled
            if ctx.compiled is not None:
                kernels, ranges = ctx.compiled
                if known is None:
                    inner += kernels.add_low_rank(x, adapted, ranges, keep=True)
                else:
                    inner += kernels.low_rank(x, [name for name, _ in adapted], ranges)
            for adapter, start, end in ctx.segments:
                factors, own = adapter.factors(x.dtype), x[start:end]
                for name, out in adapted:
                    a, b = factors[name]
                    inner.append(functional.linear(own, a))
                    if known is None:
                        out[start:end].addmm_(inner[-1], b, alpha=adapter.scaling)
        ctx.save_for_backward(x, *inner)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, *inner = ctx.saved_tensors
        siblings: Siblings = ctx.siblings
        grad_x = siblings.back(grads) if ctx.needs_input_grad[0] else None
        kept = iter(inner)
        if ctx.compiled is not None:
            kernels, ranges = ctx.compiled
            target = torch.zeros_like(x) if grad_x is None else grad_x
            sums: list[Outer] = []
            for place, name in siblings.adapted:
                grad = grads[place] if grads[place].stride(1) == 1 else grads[place].contiguous()
                for (adapter, start, end), grad_h in zip(
                    ranges.segments, kernels.low_rank_backward(grad, name, target, ranges), strict=True
                ):
                    h, gradients = next(kept), adapter.gradients(name)
                    if gradients is not None:
                        sums.append(Outer(grad_h, x[start:end], gradients[0], False, adapter.scaling))
                        sums.append(Outer(h, grad[start:end], gradients[1], True, adapter.scaling))
            kernels.low_rank_gradients(sums)
        for adapter, start, end in ctx.segments:
            factors, own = adapter.factors(x.dtype), x[start:end]
            for place, name in siblings.adapted:
                a, b = factors[name]
                grad = grads[place][start:end]
                grad_h = functional.linear(grad, b)
                h, gradients = next(kept), adapter.gradients(name)
                if gradients is not None:
                    # thin products in the layouts that matrix libraries are fast at (up to five times here)
                    gradients[0].add_(grad_h.t() @ own, alpha=adapter.scaling)
                    gradients[1].add_((h.t() @ grad).t(), alpha=adapter.scaling)
                if grad_x is not None:
                    grad_x[start:end].addmm_(grad_h, a, alpha=adapter.scaling)
        return grad_x, None, None, None, None
