"""What a forward pass computed, kept so that the way back need not compute it again.

Rollout and learning put the same tokens through the same weights. A pass of the engine can therefore hand on what it
made anyway: the outputs of each layer's matrices and of its attention, by reference, without a copy. From them and the
embeddings everything else follows by what costs little (sums, norms, rotations, activations), so a learner that finds
all its tokens among them starts with the backward pass. On a processor that is half of its work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


class Recalled:
    """Activations of packed tokens that several passes computed, layer by layer in packed order."""

    def __init__(
        self, passes: Sequence[PassActivations], which: NDArray[np.int64], rows: NDArray[np.int64], kernels: Kernels | None
    ) -> None:
        """`which` (T,): the pass each packed token went through. `rows` (T,): its row there."""
        self._passes, self._which, self._rows, self._kernels = tuple(passes), which, rows, kernels
        self._shares: list[tuple[Tensor, Tensor]] = []
        """(places, rows) of each pass, where nothing is compiled."""
        if kernels is None:
            device = passes[0][0].seen.device
            for number in range(len(passes)):
                places = np.flatnonzero(which == number)
                self._shares.append(
                    (torch.from_numpy(places).to(device), torch.from_numpy(rows[places]).to(device))
                )

    def layer(self, number: int) -> LayerActivations:
        """New tensors (T, …), contiguous."""
        layers = [made[number] for made in self._passes]
        asked = [self._gather([layer.asked[i] for layer in layers]) for i in range(len(layers[0].asked))]
        inner = [self._gather([layer.inner[i] for layer in layers]) for i in range(len(layers[0].inner))]
        seen, mixed, outer = (
            self._gather([getattr(layer, name) for layer in layers]) for name in ("seen", "mixed", "outer")
        )
        return LayerActivations(asked, seen, mixed, inner, outer)

    def _gather(self, parts: Sequence[Tensor]) -> Tensor:
        out = parts[0].new_empty(len(self._rows), parts[0].shape[1])
        if self._kernels is not None:
            begin = np.array([part.data_ptr() for part in parts])
            step = np.array([part.stride(0) * part.element_size() for part in parts])
            self._kernels.gather(begin[self._which] + self._rows * step[self._which], out)
            return out
        for part, (places, rows) in zip(parts, self._shares, strict=True):
            out.index_copy_(0, places, part.index_select(0, rows))
        return out
