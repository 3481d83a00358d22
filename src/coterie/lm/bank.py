"""All adapters in one place: the LoRA weights of every policy, and the linear layers that apply them.

Engine and learner share this bank, so a policy's next turn is sampled from exactly the weights the learner just
wrote. Each adapter's A and B matrices are views into one flat float32 vector (and its gradient into another), which
makes clipping, AdamW and checkpoints one operation per policy.

    y = x W^T + (alpha / rank) * (x A^T) B^T        A (rank, in), B (out, rank)      LoRA, Hu et al. 2021

Packed tokens of one policy are contiguous; `routing` tells the layers which range belongs to which adapter. Tokens in
no range pass through the bare base. Invariant: a token's gradient reaches exactly the adapter of its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.errors import AdapterError
from coterie.types import AdapterVersion, ModelId


@dataclass(frozen=True, slots=True)
class Shape:
    """Where one layer's adapter lies in the flat vector."""

    name: str
    """Dotted path of the linear layer in the base model."""
    fan_in: int
    fan_out: int
    offset: int

    def a(self, flat: Tensor, rank: int) -> Tensor:
        return flat[self.offset : self.offset + rank * self.fan_in].view(rank, self.fan_in)

    def b(self, flat: Tensor, rank: int) -> Tensor:
        start = self.offset + rank * self.fan_in
        return flat[start : start + rank * self.fan_out].view(self.fan_out, rank)


class Adapter:
    """One policy's LoRA weights.

    `flat` (size,) holds every A and B; `grad` (size,) their gradients, present only on adapters in training.
    """

    def __init__(
        self, sizes: Sequence[tuple[str, int, int]], rank: int, alpha: float, device: torch.device, *, trainable: bool
    ) -> None:
        self.rank, self.alpha = rank, alpha
        shapes: list[Shape] = []
        offset = 0
        for name, fan_in, fan_out in sizes:
            shapes.append(Shape(name, fan_in, fan_out, offset))
            offset += rank * (fan_in + fan_out)
        self.shapes = tuple(shapes)
        self.flat = torch.zeros(offset, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.flat) if trainable else None
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for shape in shapes:
            for store, view in ((self.a, shape.a), (self.b, shape.b)):
                # a leaf that shares storage with `flat`; its .grad shares storage with `grad`
                leaf = view(self.flat, rank).detach()
                if self.grad is not None:
                    leaf.requires_grad_(True)
                    leaf.grad = view(self.grad, rank)
                store[shape.name] = leaf

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def initialise(self, seed: int) -> None:
        """A uniform in ±1/sqrt(fan_in) from a generator seeded with `seed`, B zero: the policy starts as the base."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.flat.zero_()
            for shape in self.shapes:
                bound = 1 / math.sqrt(shape.fan_in)
                values = torch.empty(self.rank, shape.fan_in).uniform_(-bound, bound, generator=generator)
                shape.a(self.flat, self.rank).copy_(values)


Segment = tuple[Adapter, int, int]


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

    def __init__(self, linear: nn.Linear, name: str, bank: AdapterBank) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name = name
        self.bank_segments = bank.segments

    def forward(self, x: Tensor) -> Tensor:
        segments = self.bank_segments
        if not segments:
            return nn.functional.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        leaves = [leaf for adapter, _, _ in segments for leaf in (adapter.a[self.name], adapter.b[self.name])]
        out: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.bias, tuple(segments), *leaves
        )
        return out.view(*x.shape[:-1], -1)


class AdapterBank:
    """Every adapter of a run: those in training, by model id, and frozen ones, by version."""

    def __init__(self, model: nn.Module, targets: Sequence[str], layer_share: float = 1.0) -> None:
        """Replace the target layers of `model` by `BankLinear`.

        Args:
            model: a causal language model of transformers; its weights stay frozen.
            targets: last parts of the names of the linear layers to adapt ("q_proj", …).
            layer_share: share of the layers, counted from the top, that are adapted.

        Raises:
            AdapterError: a target names no linear layer.
        """
        self.segments: list[Segment] = []
        self._training: dict[ModelId, Adapter] = {}
        self._versions: dict[ModelId, int] = {}
        self._frozen: dict[AdapterVersion, Adapter] = {}
        self.targets = tuple(targets)
        first = _first_layer(model, layer_share)
        found: dict[str, nn.Linear] = {}
        for name, module in model.named_modules():
            last = name.rsplit(".", 1)[-1]
            if isinstance(module, nn.Linear) and last in targets and _layer_index(name) >= first:
                found[name] = module
        missing = [t for t in targets if not any(name.rsplit(".", 1)[-1] == t for name in found)]
        if missing:
            present = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise AdapterError(
                f"lora_targets {missing[0]!r} names no linear layer of {type(model).__name__}; "
                f"it has {', '.join(present)}"
            )
        self.sizes: tuple[tuple[str, int, int], ...] = tuple(
            (name, linear.in_features, linear.out_features) for name, linear in found.items()
        )
        self.layers: tuple[int, ...] = tuple(sorted({_layer_index(name) for name in found}))
        self.device = next(model.parameters()).device
        for name, linear in found.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, BankLinear(linear, name, self))

    def add(self, model_id: ModelId, rank: int, alpha: float, seed: int) -> Adapter:
        """A new adapter in training, version 0, equal to the base."""
        if model_id in self._training:
            raise AdapterError(f"model {model_id!r} already has an adapter in this bank")
        adapter = Adapter(self.sizes, rank, alpha, self.device, trainable=True)
        adapter.initialise(seed)
        self._training[model_id] = adapter
        self._versions[model_id] = 0
        return adapter

    def remove(self, model_id: ModelId) -> None:
        del self._training[model_id], self._versions[model_id]

    def training(self, model_id: ModelId) -> Adapter:
        """The adapter of a model in training."""
        return self._training[model_id]

    def empty(self, rank: int, alpha: float) -> Adapter:
        """A frozen adapter of zeros that fits this base, to be filled."""
        return Adapter(self.sizes, rank, alpha, self.device, trainable=False)

    def freeze(self, version: AdapterVersion, adapter: Adapter) -> None:
        """Keep `adapter` under a version of its own; it is never trained."""
        self._frozen[version] = adapter

    def publish(self, version: AdapterVersion) -> None:
        """The training adapter of this model now goes by `version`."""
        if version.model_id not in self._training:
            raise AdapterError(f"cannot publish {version.name}: no such model is in training")
        self._versions[version.model_id] = version.version

    def holds(self, version: AdapterVersion) -> bool:
        return version in self._frozen or self._versions.get(version.model_id) == version.version

    def get(self, version: AdapterVersion) -> Adapter:
        """Raises AdapterError when this version is neither current nor kept."""
        if self._versions.get(version.model_id) == version.version:
            return self._training[version.model_id]
        if version in self._frozen:
            return self._frozen[version]
        current = self._versions.get(version.model_id)
        hint = f"its current version is {current}" if current is not None else "no such model is known"
        raise AdapterError(f"adapter {version.name} is not in the bank; {hint}")

    @contextmanager
    def routing(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within: packed tokens [start, end) of each segment go through its adapter."""
        if self.segments:
            raise RuntimeError("routing is already active; passes may not be nested")
        self.segments.extend(segments)
        try:
            yield
        finally:
            self.segments.clear()


def _layer_index(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


def _first_layer(model: nn.Module, share: float) -> int:
    count = 1 + max(_layer_index(name) for name, _ in model.named_modules())
    return count - max(1, round(count * share))
