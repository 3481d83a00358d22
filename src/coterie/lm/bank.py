"""All adapters of a run in one place.

Engine and learner share this bank, so a policy's next turn is sampled from exactly the weights the learner just
wrote. Packed tokens of one policy are contiguous; `routing` tells the linear layers (`coterie.lm.linear`) which range
belongs to which adapter. Tokens in no range pass through the bare base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from coterie.errors import AdapterError
from coterie.lm.adapter import Adapter, AdapterPool, Segment
from coterie.lm.linear import BankLinear
from coterie.lm.native.kernels import kernels_for
from coterie.lm.route import Route
from coterie.types import AdapterVersion, ModelId


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
        weight = next(model.parameters())
        self.route = Route(kernels_for(weight.dtype, weight.device))
        self._passing = threading.RLock()
        self._routed = False
        self._pools: list[AdapterPool] = []
        self._training: dict[ModelId, Adapter] = {}
        self._versions: dict[ModelId, int] = {}
        self._published: dict[ModelId, int] = {}
        """`Adapter.changes` when the model was last published."""
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
            setattr(model.get_submodule(parent), last, BankLinear(linear, name, self.route))

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
        self._published.pop(model_id, None)

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
        self.freeze(version, self.copy(version.model_id))

    def copy(self, model_id: ModelId) -> Adapter:
        """A frozen adapter with a model's current weights; it is the caller's, and goes by no version."""
        source = self._training[model_id]
        made = self.empty(source.rank, source.alpha)
        with torch.no_grad():
            made.flat.copy_(source.flat)
        made.touch()
        return made

    def kept(self, model_id: ModelId) -> tuple[AdapterVersion, ...]:
        """Frozen versions of one model, oldest first."""
        return tuple(sorted(version for version in self._frozen if version.model_id == model_id))

    def drop(self, version: AdapterVersion) -> None:
        """Forget a frozen version. Raises AdapterError when there is none."""
        if version not in self._frozen:
            raise AdapterError(f"adapter {version.name} is not among the frozen ones of this bank")
        del self._frozen[version]

    def publish(self, version: AdapterVersion) -> None:
        """The training adapter of this model now goes by `version`, with the weights it has at this moment."""
        if version.model_id not in self._training:
            raise AdapterError(f"cannot publish {version.name}: no such model is in training")
        self._training[version.model_id].touch()  # whoever changed them may not have said so
        self._versions[version.model_id] = version.version
        self._published[version.model_id] = self._training[version.model_id].changes

    def standing(self, model_id: ModelId) -> AdapterVersion | None:
        """The version whose weights the adapter in training still has; None: they changed since it was published."""
        if self._published.get(model_id) != self._training[model_id].changes:
            return None
        return AdapterVersion(model_id, self._versions[model_id])

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
            self.route.lead(segments, self.device)
            try:
                yield
            finally:
                self.route.lead((), self.device)
                self._routed = False


def _layer_index(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


def _first_layer(model: nn.Module, share: float) -> int:
    count = 1 + max(_layer_index(name) for name, _ in model.named_modules())
    return count - max(1, round(count * share))
