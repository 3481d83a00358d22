"""What a forward pass computed, kept so that the way back need not compute it again.

Rollout and learning put the same tokens through the same weights. A pass of the engine can therefore hand on what it
made anyway: the outputs of each layer's matrices and of its attention, and logits, by reference, without a copy. From them and the
embeddings everything else follows by what costs little (sums, norms, rotations, activations), so a learner that finds
all its tokens among them starts with the backward pass. On a processor that is half of its work.
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

    asked: Sequence[Tensor]
    """Queries, keys and values (T, heads * dim), neither normed nor rotated."""
    seen: Tensor
    """(T, heads * dim): what attention made of them."""
    mixed: Tensor
    """(T, hidden): what attention's last matrix made of that."""
    inner: Sequence[Tensor]
    """Gate and up (T, size)."""
    outer: Tensor
    """(T, hidden): what the last matrix made of their product."""

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.asked, self.seen, self.mixed, *self.inner, self.outer)


PassActivations = Sequence[LayerActivations]
"""Of every layer, in order."""


def nbytes(made: PassActivations) -> int:
    """Memory a pass's activations take."""
    return sum(tensor.nbytes for layer in made for tensor in layer.tensors())


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

    def __init__(self, store: Store, which: NDArray[np.int64], rows: NDArray[np.int64], kernels: Kernels | None) -> None:
        """`which` (T,): the pass each packed token went through. `rows` (T,): its row there."""
        self._passes, self._logits, self._logits_of = tuple(store.passes), tuple(store.logits), store.logits_of
        self._which, self._rows, self._kernels = which, rows, kernels

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
        layers = [made[number] for made in self._passes]
        asked = [self._packed([layer.asked[i] for layer in layers]) for i in range(len(layers[0].asked))]
        inner = [self._packed([layer.inner[i] for layer in layers]) for i in range(len(layers[0].inner))]
        seen, mixed, outer = (
            self._packed([getattr(layer, name) for layer in layers]) for name in ("seen", "mixed", "outer")
        )
        return LayerActivations(asked, seen, mixed, inner, outer)

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
