"""Whole decoder layers without gradients, each in one call (`decoder_layer.h`).

With few tokens, calling a layer's parts and waking threads for each of them takes as long as some of the parts. The
numbers are those of the parts called one by one, bit by bit.
"""

from __future__ import annotations

from ctypes import Structure, addressof, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Panels, Ranges, Sights

MOST_SIBLINGS = 3
"""As in decoder_layer.h, and so are all structures here."""


class _Siblings(Structure):
    _fields_ = (
        ("panels", c_void_p), ("bias", c_void_p), ("size", c_int64), ("out", c_int64), ("adapted", c_int64),
        ("offset", c_int64 * MOST_SIBLINGS), ("width", c_int64 * MOST_SIBLINGS),
    )  # fmt: skip


class _Layer(Structure):
    _fields_ = (
        ("asked", _Siblings), ("mixed", _Siblings), ("inner", _Siblings), ("outer", _Siblings),
        ("before_attention", c_void_p), ("before_mlp", c_void_p), ("kv_heads", c_int64), ("group", c_int64),
        ("dim", c_int64), ("attention_eps", c_float), ("mlp_eps", c_float), ("scale", c_float),
    )  # fmt: skip


class _Pass(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "cos", "sin", "own", "slots", "first", "seen", "ranks", "scales", "starts", "ends",
            "normed", "blended", "gated", "left",
        )),
        *((name, c_int64) for name in (
            "tokens", "angle_row", "most_seen", "pool_head", "ranges", "most_rank", "threads",
        )),
    )  # fmt: skip


class _Call(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "total", "asked", "seen", "middle", "inner", "pool_k", "pool_v")),
        ("factors", c_void_p * 8), ("adds", c_int64),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers that read the same input, their outputs side by side."""

    panels: Panels
    size: int
    """Of the input."""
    sizes: tuple[int, ...]
    """Of the outputs."""
    adapted: tuple[tuple[int, str], ...]
    """(place among the layers, name) of those that have adapters."""

    def described(self) -> _Siblings:
        offsets = [sum(self.sizes[:place]) for place, _ in self.adapted]
        widths = [self.sizes[place] for place, _ in self.adapted]
        bias = None if self.panels.bias is None else self.panels.bias.data_ptr()
        several = c_int64 * MOST_SIBLINGS
        return _Siblings(self.panels.data.data_ptr(), bias, self.size, self.panels.out, len(self.adapted),
                         several(*offsets), several(*widths))  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.adapted)


class WholeLayer:
    """A layer as one call takes it: what is the same in every pass."""

    def __init__(
        self,
        groups: tuple[Group, Group, Group, Group],
        norms: tuple[tuple[Tensor, float], tuple[Tensor, float]],
        heads: tuple[int, int, int],
        scale: float,
    ) -> None:
        """
        Args:
            groups: queries, keys and values; what follows attention; gate and up; what follows them.
            norms: weight float32 (hidden,) and epsilon of the one before attention, and of that before gate and up.
            heads: how many keys have, how many queries each of them has, and their dimension.
        """
        self.groups = groups
        self._norms = norms  # kept, so that addresses stay true
        (attention, attention_eps), (mlp, mlp_eps) = norms
        self.described = _Layer(
            *(group.described() for group in groups), attention.data_ptr(), mlp.data_ptr(), *heads,
            attention_eps, mlp_eps, scale,
        )  # fmt: skip
        self.names = tuple(group.names for group in groups)


@dataclass(frozen=True, slots=True)
class Made:
    """What a layer computed, (T, …) each, contiguous."""

    x: Tensor
    asked: Tensor
    seen: Tensor
    middle: Tensor
    inner: Tensor


class WholePass:
    """New tokens on their way through whole layers."""

    def __init__(
        self,
        kernels: Kernels,
        like: WholeLayer,
        angles: tuple[Tensor, Tensor],
        own: Tensor,
        see: Sights,
        ranges: Ranges | None,
        *,
        keep: bool,
    ) -> None:
        """
        Args:
            like: any of the layers; all have the same sizes.
            angles: float32 cosine and sine (T, 1, dim / 2), as for `Kernels.rotate`.
            own: int64 (T,): the cache slot of each token.
            see: slots.
            ranges: of tokens and their adapters; None: there are none.
            keep: make new tensors in every layer; otherwise the input is written over.
        """
        self._kernels, self._keep, self._ranges = kernels, keep, ranges
        asked, mixed, inner, outer = like.groups
        self._tokens = tokens = len(own)
        self._widths = asked.panels.out, mixed.size, asked.size, inner.panels.out
        self._room = [torch.empty(tokens, width) for width in (asked.size, asked.size, outer.size)]
        self.left = torch.empty(tokens, asked.size)
        """What the last layer so far left to be added."""
        self._shared = None if keep else [torch.empty(tokens, width) for width in self._widths]
        self._held = (*angles, own, see)
        cos, sin = angles
        low = (None, None, None, None) if ranges is None else (ranges.ranks, ranges.scales, ranges.starts, ranges.ends)
        self._pass = _Pass(
            cos.data_ptr(), sin.data_ptr(), own.data_ptr(), see.slots.data_ptr(), see.first.data_ptr(),
            see.seen.data_ptr(), *(None if array is None else addressof(array) for array in low),
            *(room.data_ptr() for room in self._room), self.left.data_ptr(), tokens, cos.stride(0), see.most, 0,
            0 if ranges is None else ranges.count, 0 if ranges is None else ranges.most_rank, torch.get_num_threads(),
        )  # fmt: skip
        self._call = _Call()
        self._first = True

    def __call__(self, layer: WholeLayer, x: Tensor, pool_k: Tensor, pool_v: Tensor) -> Made:
        """One layer: x (T, hidden) contiguous, to which `left` is added unless it is the first one; pools
        (kv_heads, slots, dim). What comes out is `middle`, and anew `left`."""
        call = self._call
        tokens, adds = self._tokens, not self._first
        self._first = False
        if self._shared is None:
            asked, seen, middle, inner = (torch.empty(tokens, width) for width in self._widths)
            total = torch.empty(tokens, x.shape[1]) if adds else x
        else:
            asked, seen, _, inner = self._shared
            total = middle = x
        call.x, call.total, call.asked, call.seen = x.data_ptr(), total.data_ptr(), asked.data_ptr(), seen.data_ptr()
        call.middle, call.inner = middle.data_ptr(), inner.data_ptr()
        call.pool_k, call.pool_v, call.adds = pool_k.data_ptr(), pool_v.data_ptr(), adds
        self._pass.pool_head = pool_k.stride(0)
        if self._ranges is not None:
            for number, names in enumerate(layer.names):
                if names:
                    a, b = self._ranges.addresses.of(names)
                    call.factors[2 * number], call.factors[2 * number + 1] = addressof(a), addressof(b)
        self._kernels.decoder_layer(byref(layer.described), byref(self._pass), byref(call))
        return Made(total, asked, seen, middle, inner)
