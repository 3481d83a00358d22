"""What a forward pass computed, kept so that the way back need not compute it again.

Rollout and learning put the same tokens through the same weights. A pass of the engine can therefore hand on what it
made anyway, by reference, without a copy: what came into each layer, the outputs of its matrices and of its attention,
and logits. From these everything else follows by what costs little (norms, rotations, activations), so a learner that
finds all its tokens among them starts with the backward pass, a layer at a time. On a processor that is half of its
work, and most of its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.lm.native.kernels import Kernels


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Of the tokens of one pass in one layer; updates of adapters included."""

    x: Tensor
    """(T, hidden): what came into the layer."""
    asked: Sequence[Tensor]
    """Queries, keys and values (T, heads * dim), neither normed nor rotated."""
    seen: Tensor
    """(T, heads * dim): what attention made of them."""
    middle: Tensor
    """(T, hidden): x and what attention's last matrix made of that."""
    inner: Sequence[Tensor]
    """Gate and up (T, size)."""

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.x, *self.asked, self.seen, self.middle, *self.inner)


@dataclass(slots=True)
class PassActivations:
    """Of the tokens of one pass, filled as it goes."""

    layers: list[LayerActivations] = field(default_factory=list)
    last: Tensor | None = None
    """(T, hidden): what came out of the last layer."""

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        last = 0 if self.last is None else self.last.nbytes
        return last + sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())


Place = tuple[int, int]
"""Number of a tensor, or of a pass, and a row."""


@dataclass(slots=True)
class Store:
    """What passes, and products with the output matrix after them, left behind."""

    passes: list[PassActivations] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """(n, vocabulary) each."""
    logits_of: dict[Place, Place] = field(default_factory=dict)
    """Where a token went through the layers -> where its logits are."""
    nbytes: int = 0

    def clear(self) -> None:
        self.passes.clear()
        self.logits.clear()
        self.logits_of.clear()
        self.nbytes = 0


class Recalled:
    """Activations of packed tokens that several passes computed, in packed order."""

    def __init__(
        self,
        passes: Sequence[PassActivations],
        store: Store,
        which: NDArray[np.int64],
        rows: NDArray[np.int64],
        kernels: Kernels | None,
        computed: int = 0,
    ) -> None:
        """
        Args:
            passes: those of `store`, and perhaps one more.
            which: (T,) the pass each packed token went through.
            rows: (T,) its row there.
            computed: tokens of which nothing was known until now.
        """
        self._passes, self._logits, self._logits_of = passes, store.logits, store.logits_of
        self._which, self._rows, self._kernels = which, rows, kernels
        self.computed = computed

    def logits(self, places: Sequence[int]) -> Tensor | None:
        """Those of some packed tokens, a new tensor (n, vocabulary); None: some were never made."""
        found = [self._logits_of.get((int(self._which[place]), int(self._rows[place]))) for place in places]
        known = [place for place in found if place is not None]
        if not known or len(known) < len(found):
            return None
        which, rows = np.array(known).T
        return self._gather(self._logits, which, rows)

    def layer(self, number: int) -> LayerActivations:
        """New tensors (T, …), contiguous."""
        layers = [made.layers[number] for made in self._passes]
        x, seen, middle = (self._packed([getattr(layer, name) for layer in layers]) for name in ("x", "seen", "middle"))
        asked, inner = (
            [self._packed(parts) for parts in zip(*(getattr(layer, name) for layer in layers), strict=True)]
            for name in ("asked", "inner")
        )
        return LayerActivations(x, asked, seen, middle, inner)

    def last(self) -> Tensor:
        """What came out of the last layer, a new tensor (T, hidden)."""
        return self._packed([made.last for made in self._passes if made.last is not None])

    def _packed(self, parts: Sequence[Tensor]) -> Tensor:
        return self._gather(parts, self._which, self._rows)

    def _gather(self, parts: Sequence[Tensor], which: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        """Row `rows[i]` of part `which[i]`, one after another."""
        out = parts[0].new_empty(len(rows), parts[0].shape[1])
        if self._kernels is not None:
            begin = np.array([part.data_ptr() for part in parts])
            step = np.array([part.stride(0) * part.element_size() for part in parts])
            self._kernels.gather(begin[which] + rows * step[which], out)
            return out
        for number, part in enumerate(parts):
            (places,) = np.nonzero(which == number)
            theirs = torch.from_numpy(rows[places]).to(out.device)
            out.index_copy_(0, torch.from_numpy(places).to(out.device), part.index_select(0, theirs))
        return out
