"""What compiled kernels take and give besides tensors."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from coterie.lm.adapter import Cast, Segment


@dataclass(frozen=True, slots=True)
class Sights:
    """What each packed token sees, as lists of places: no padding, no masks; for compiled attention."""

    slots: Tensor
    """int32: one list after another; of cache slots, or of packed tokens."""
    first: Tensor
    """int64 (T,): where a token's list begins."""
    seen: Tensor
    """int32 (T,): how long it is."""
    most: int
    """The longest."""


class Addresses:
    """Where the factors of some adapters lie, for layers that are asked for together; true while `are` says so."""

    def __init__(self, factors: Sequence[Cast]) -> None:
        self._factors = [ref(cast) for cast in factors]
        self._found: dict[tuple[str, ...], tuple[Any, Any]] = {}

    def are(self, factors: Sequence[Cast]) -> bool:
        """Whether these are the addresses of `factors`."""
        same = len(self._factors) == len(factors)
        return same and all(known() is cast for known, cast in zip(self._factors, factors, strict=True))

    def of(self, names: tuple[str, ...]) -> tuple[Any, Any]:
        """Arrays of the addresses of A and of B transposed: of each layer for every adapter."""
        found = self._found.get(names)
        if found is None:
            casts = [cast for cast in (known() for known in self._factors) if cast is not None]
            places = c_void_p * (len(names) * len(self._factors))
            pairs = [cast[name] for name in names for cast in casts]
            a, b = places(*(a.data_ptr() for a, _ in pairs)), places(*(b.data_ptr() for _, b in pairs))
            found = self._found[names] = a, b
        return found


class Ranges:
    """Ranges of tokens and the adapters they go through, as `Kernels.add_low_rank` takes them."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, known: Addresses | None = None) -> None:
        """`known`: those of earlier ranges, used again if they are of the same adapters."""
        self._factors = [adapter.factors(dtype) for adapter, _, _ in segments]  # kept, so that addresses stay true
        self.addresses = known if known is not None and known.are(self._factors) else Addresses(self._factors)
        self.segments = tuple(segments)
        self.count = count = len(segments)
        self.ranks = (c_int64 * count)(*(adapter.rank for adapter, _, _ in segments))
        self.scales = (c_float * count)(*(adapter.scaling for adapter, _, _ in segments))
        self.starts = (c_int64 * count)(*(start for _, start, _ in segments))
        self.ends = (c_int64 * count)(*(end for _, _, end in segments))
        self.most_rank = max(adapter.rank for adapter, _, _ in segments)
        self.sizes = [(end - start, adapter.rank) for adapter, start, end in segments]


class OuterJob(Structure):
    """As in low_rank.h."""

    _fields_ = (
        ("left", c_void_p), ("x", c_void_p), ("to", c_void_p), ("rank", c_int64), ("x_row", c_int64),
        ("tokens", c_int64), ("size", c_int64), ("transposed", c_int64), ("scale", c_float),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outer:
    """scale left^T x, to be added to `to`: what some tokens give to the gradient of a factor of an adapter."""

    left: Tensor
    """(tokens, rank) contiguous."""
    x: Tensor
    """(tokens, size); rows may be far apart."""
    to: Tensor
    """float32 (rank, size), contiguous; or (size, rank), if `transposed`."""
    transposed: bool
    scale: float

    def described(self) -> OuterJob:
        tokens, size = self.x.shape
        return OuterJob(self.left.data_ptr(), self.x.data_ptr(), self.to.data_ptr(), self.left.shape[1],
                        self.x.stride(0), tokens, size, self.transposed, self.scale)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Panels:
    """A frozen matrix (out, size), and what is added to its products, in the order `Kernels.product` reads them in."""

    data: Tensor
    out: int
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What normalises rows of logits, (n,) each."""

    sharpness: Tensor
    """float32: one over the temperature."""
    most: Tensor
    """float32: the largest logit."""
    log_z: Tensor
    """float64: log of the sum of exp(sharpness * (logit - most))."""
    entropy: Tensor
    """float64, nats."""
    chunks: Tensor
    """float64 (n, chunks): parts of that sum."""
    best: Tensor
    """int64: where the largest logit is."""
