"""All adapters in one place, and the linear layers that apply them.

Engine and learner share this bank, so a policy's next turn is sampled from exactly the weights the learner just
wrote.

    y = x W^T + (alpha / rank) * (x A^T) B^T        A (rank, in), B (out, rank)      LoRA, Hu et al. 2021

Packed tokens of one policy are contiguous; `routing` tells the layers which range belongs to which adapter. Tokens in
no range pass through the bare base. Invariant: a token's gradient reaches exactly the adapter of its range.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.errors import AdapterError
from coterie.lm.adapter import Adapter, AdapterPool, Segment
from coterie.lm.products import frozen_linear
from coterie.types import AdapterVersion, ModelId

BATCHED_SEGMENTS = 6
"""Adapters of one pool from which a batched product is quicker than one after the other."""
BATCHED_TOKENS = 48
"""Tokens a segment up to which that holds."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Short segments of neighbouring adapters of one pool, padded to one length."""

    pool: AdapterPool
    first: int
    """Row of the first adapter."""
    index: Tensor
    """int64 (adapters * length,): packed token of each place; padding repeats token 0."""
    scaling: Tensor
    """(adapters, 1, 1)"""
    tokens: Tensor
    """int64 (n,): packed tokens that are in these segments."""
    places: Tensor
    """int64 (n,): where they stand in the padded order."""


@dataclass(slots=True)
class Route:
    """Which packed tokens go through which adapter in the pass under way."""

    segments: tuple[Segment, ...] = ()
    single: tuple[Segment, ...] = ()
    """Those applied one after the other, when no gradient is wanted."""
    batched: tuple[Batched, ...] = ()
    """And those applied together."""


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
        self.route = bank.route

    def forward(self, x: Tensor) -> Tensor:
        segments = self.route.segments
        flat = x.reshape(-1, x.shape[-1])
        if not torch.is_grad_enabled():
            return self._inference(flat).view(*x.shape[:-1], -1)
        if not segments:
            return nn.functional.linear(x, self.weight, self.bias)
        leaves = [leaf for adapter, _, _ in segments for leaf in (adapter.a[self.name], adapter.b[self.name])]
        out: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.bias, segments, *leaves
        )
        return out.view(*x.shape[:-1], -1)

    def _inference(self, x: Tensor) -> Tensor:
        """The same sum for (T, in) tokens, without autograd's bookkeeping and with short segments batched."""
        out = frozen_linear(x, self.weight, self.bias)
        for adapter, start, end in self.route.single:
            a, b_t = adapter.factors(x.dtype)[self.name]
            out[start:end].addmm_(nn.functional.linear(x[start:end], a), b_t, alpha=adapter.scaling)
        for group in self.route.batched:
            count = group.scaling.shape[0]
            a = group.pool.a(self.name, group.first, count).to(x.dtype)
            b = group.pool.b(self.name, group.first, count).to(x.dtype)
            padded = x.index_select(0, group.index).view(count, -1, x.shape[-1])
            h = torch.bmm(padded, a.transpose(1, 2)).mul_(group.scaling)
            update = torch.bmm(h, b.transpose(1, 2)).view(-1, out.shape[-1])
            out.index_add_(0, group.tokens, update.index_select(0, group.places))
        return out


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
        self.route = Route()
        self._passing = threading.RLock()
        self._routed = False
        self._pools: list[AdapterPool] = []
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
        adapter = Adapter(self._pool(rank), alpha, trainable=True)
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
        return Adapter(self._pool(rank), alpha, trainable=False)

    def _pool(self, rank: int) -> AdapterPool:
        for pool in self._pools:
            if pool.rank == rank and not pool.full:
                return pool
        self._pools.append(AdapterPool(self.sizes, rank, self.device))
        return self._pools[-1]

    def freeze(self, version: AdapterVersion, adapter: Adapter) -> None:
        """Keep `adapter` under a version of its own; it is never trained."""
        self._frozen[version] = adapter

    def keep(self, version: AdapterVersion) -> None:
        """Freeze a copy of a model's current weights under `version`, so that it can still be asked while the learner
        changes them."""
        source = self._training[version.model_id]
        copy = self.empty(source.rank, source.alpha)
        with torch.no_grad():
            copy.flat.copy_(source.flat)
        copy.touch()
        self.freeze(version, copy)

    def kept(self, model_id: ModelId) -> tuple[AdapterVersion, ...]:
        """Frozen versions of one model, oldest first."""
        return tuple(sorted(version for version in self._frozen if version.model_id == model_id))

    def drop(self, version: AdapterVersion) -> None:
        """Forget a frozen version. Raises AdapterError when there is none."""
        if version not in self._frozen:
            raise AdapterError(f"adapter {version.name} is not among the frozen ones of this bank")
        del self._frozen[version]

    def publish(self, version: AdapterVersion) -> None:
        """The training adapter of this model now goes by `version`."""
        if version.model_id not in self._training:
            raise AdapterError(f"cannot publish {version.name}: no such model is in training")
        self._versions[version.model_id] = version.version

    def holds(self, version: AdapterVersion) -> bool:
        return version in self._frozen or self._versions.get(version.model_id) == version.version

    def get(self, version: AdapterVersion) -> Adapter:
        """The kept copy where there is one, else the adapter in training if it goes by this version.

        Raises:
            AdapterError: this version is neither current nor kept.
        """
        if version in self._frozen:
            return self._frozen[version]
        if self._versions.get(version.model_id) == version.version:
            return self._training[version.model_id]
        current = self._versions.get(version.model_id)
        hint = f"its current version is {current}" if current is not None else "no such model is known"
        raise AdapterError(f"adapter {version.name} is not in the bank; {hint}")

    @contextmanager
    def routing(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within: packed tokens [start, end) of each segment go through its adapter.

        One pass at a time: a pass of another thread waits (a learner at work while episodes are played).
        """
        with self._passing:
            if self._routed:
                raise RuntimeError("routing is already active; passes may not be nested")
            self._routed = True
            self.route.segments = tuple(segments)
            if not torch.is_grad_enabled():
                self.route.single, self.route.batched = _divide(segments, self.device)
            try:
                yield
            finally:
                self.route.segments = self.route.single = self.route.batched = ()
                self._routed = False


def _divide(segments: Sequence[Segment], device: torch.device) -> tuple[tuple[Segment, ...], tuple[Batched, ...]]:
    """Segments to be applied one after the other, and runs of short ones whose adapters are neighbours in a pool."""
    runs: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (id(s[0].pool), s[0].row)):
        last = runs[-1][-1][0] if runs else None
        if last is not None and last.pool is segment[0].pool and last.row + 1 == segment[0].row:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    single: list[Segment] = []
    batched = []
    for run in runs:
        if len(run) < BATCHED_SEGMENTS or sum(end - start for _, start, end in run) > BATCHED_TOKENS * len(run):
            single.extend(run)
        else:
            batched.append(_batched(run, device))
    return tuple(single), tuple(batched)


def _batched(run: Sequence[Segment], device: torch.device) -> Batched:
    length = max(end - start for _, start, end in run)
    index = torch.zeros(len(run), length, dtype=torch.int64)
    tokens, places = [], []
    for number, (_, start, end) in enumerate(run):
        index[number, : end - start] = torch.arange(start, end)
        tokens.append(torch.arange(start, end))
        places.append(torch.arange(number * length, number * length + end - start))
    scaling = torch.tensor([adapter.scaling for adapter, _, _ in run])
    return Batched(
        run[0][0].pool,
        run[0][0].row,
        index.flatten().to(device),
        scaling[:, None, None].to(device),
        torch.cat(tokens).to(device),
        torch.cat(places).to(device),
    )


def _layer_index(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


def _first_layer(model: nn.Module, share: float) -> int:
    count = 1 + max(_layer_index(name) for name, _ in model.named_modules())
    return count - max(1, round(count * share))
