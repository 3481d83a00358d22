"""The way back through whole decoder layers whose activations are known, each in one call (`decoder_back.h`).

Gradients of adapters are added to their own, as where autograd calls the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.lm.activations import LayerActivations
from coterie.lm.native.decoding import MOST_SIBLINGS
from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Panels, Ranges, Sights


class _Siblings(Structure):
    _fields_ = (
        ("panels", c_void_p), ("size", c_int64), ("adapted", c_int64), ("place", c_int64 * MOST_SIBLINGS),
    )  # fmt: skip


class _Layer(Structure):
    _fields_ = (
        ("asked", _Siblings), ("mixed", _Siblings), ("inner", _Siblings), ("outer", _Siblings),
        ("before_attention", c_void_p), ("before_mlp", c_void_p), ("kv_heads", c_int64), ("group", c_int64),
        ("dim", c_int64), ("between", c_int64), ("attention_eps", c_float), ("mlp_eps", c_float), ("scale", c_float),
    )  # fmt: skip


_ROOM = (
    "normed", "gated", "grad_gated", "gates", "grad_normed", "middle", "grad_seen", "turned", "attention", "inverse",
    "low", "low_grad",
)  # fmt: skip


class _Pass(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "cos", "sin", "slots", "first", "seen", "ranks", "scales", "starts", "ends", *_ROOM,
        )),
        *((name, c_int64) for name in ("tokens", "angle_row", "most_seen", "ranges", "most_rank", "threads")),
    )  # fmt: skip


class _Call(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "q", "k", "v", "seen", "middle", "gate", "up", "grad", "to")),
        ("factors", c_void_p * 8), ("gradients", c_void_p * 8),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BackGroup:
    """The way back through linear layers that read the same input."""

    panels: Panels
    """Of the transposed matrices, side by side."""
    adapted: tuple[tuple[int, str], ...]
    """(place among the layers, name) of those that have adapters."""

    def described(self) -> _Siblings:
        places = (c_int64 * MOST_SIBLINGS)(*(place for place, _ in self.adapted))
        return _Siblings(self.panels.data.data_ptr(), self.panels.out, len(self.adapted), places)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.adapted)


class WholeLayerBack:
    """A layer as one call of the way back takes it: what is the same in every pass."""

    def __init__(
        self,
        groups: tuple[BackGroup, BackGroup, BackGroup, BackGroup],
        norms: tuple[tuple[Tensor, float], tuple[Tensor, float]],
        heads: tuple[int, int, int],
        scale: float,
    ) -> None:
        """See `WholeLayer`."""
        self._groups, self._norms = groups, norms  # kept, so that addresses stay true
        (attention, attention_eps), (mlp, mlp_eps) = norms
        self.hidden, self.wide, self.between = (groups[place].panels.out for place in (0, 1, 3))
        self.kv = heads[0] * heads[2]
        self.described = _Layer(
            *(group.described() for group in groups), attention.data_ptr(), mlp.data_ptr(), *heads, self.between,
            attention_eps, mlp_eps, scale,
        )  # fmt: skip
        self.names = tuple(group.names for group in groups)


class WholePassBack:
    """Gradients on their way back through whole layers."""

    def __init__(
        self,
        kernels: Kernels,
        like: WholeLayerBack,
        angles: tuple[Tensor, Tensor],
        see: Sights,
        ranges: Ranges | None,
    ) -> None:
        """
        Args:
            like: any of the layers; all have the same sizes.
            angles: float32 cosine and sine (T, 1, dim / 2), as for `Kernels.rotate`.
            see: tokens of the pass, which stand in depth-first order of their prefix tree.
            ranges: of tokens and their adapters; None: there are none.
        """
        self._kernels, self._ranges = kernels, ranges
        cos, sin = angles
        tokens, hidden, wide, between = len(cos), like.hidden, like.wide, like.between
        rank = 0 if ranges is None else MOST_SIBLINGS * ranges.most_rank
        sizes = (hidden, between, between, 2 * between, hidden, hidden, wide, wide + 2 * like.kv, wide + 2 * like.kv, 1,
                 rank, rank)  # fmt: skip
        self._room = [torch.empty(tokens * size) for size in sizes]
        self._held = (*angles, see)
        low = (None, None, None, None) if ranges is None else (ranges.ranks, ranges.scales, ranges.starts, ranges.ends)
        self._pass = _Pass(
            cos.data_ptr(), sin.data_ptr(), see.slots.data_ptr(), see.first.data_ptr(), see.seen.data_ptr(),
            *(None if array is None else addressof(array) for array in low), *(room.data_ptr() for room in self._room),
            tokens, cos.stride(0), see.most, 0 if ranges is None else ranges.count,
            0 if ranges is None else ranges.most_rank, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self, layer: WholeLayerBack, made: LayerActivations, grad: Tensor, *, lowest: bool) -> Tensor | None:
        """From the gradient (T, hidden) at what came out of a layer to that at what came in; None for the `lowest`, of
        which nobody asks it. What was made is contiguous."""
        to = None if lowest else torch.empty_like(grad)
        call = _Call(
            made.x.data_ptr(), *(part.data_ptr() for part in made.asked), made.seen.data_ptr(), made.middle.data_ptr(),
            *(part.data_ptr() for part in made.inner), grad.data_ptr(), None if to is None else to.data_ptr(),
        )  # fmt: skip
        held = []
        if self._ranges is not None:
            for number, names in enumerate(layer.names):
                if names:
                    gradients = self._gradients(names, self._ranges)
                    held.append(gradients)
                    for half, array in enumerate(self._ranges.addresses.of(names)):
                        call.factors[2 * number + half] = addressof(array)
                        call.gradients[2 * number + half] = addressof(gradients[half])
        self._kernels.decoder_layer_back(byref(layer.described), byref(self._pass), byref(call))
        return to

    @staticmethod
    def _gradients(names: Sequence[str], ranges: Ranges) -> tuple[Any, Any]:
        """Addresses of the gradients of A, and of B, of every adapter in each of the layers; null: not trained."""
        found = [adapter.gradients(name) for name in names for adapter, _, _ in ranges.segments]
        places = c_void_p * len(found)
        of_a = places(*(None if pair is None else pair[0].data_ptr() for pair in found))
        of_b = places(*(None if pair is None else pair[1].data_ptr() for pair in found))
        return of_a, of_b
