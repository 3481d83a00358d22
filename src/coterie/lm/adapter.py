"""LoRA weights of one policy, and the pools they lie in.

Each adapter's A and B matrices are views into one flat float32 vector (and its gradient into another), which makes
clipping, AdamW and checkpoints one operation per policy. Adapters of one rank are rows of one pool, so that the same
layer of many adapters is a batch of matrices that already stands in memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_ON_CPU, _ROWS_ELSEWHERE = 16, 4
"""Adapters a pool has room for. Ordinary memory that was never written costs nothing; a graphics card's does."""


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


Factors = tuple[Tensor, Tensor]


class Cast(dict[str, Factors]):
    """A and B transposed of every layer in one data type; who only remembers it lets it go (weak references)."""


class AdapterPool:
    """Room for a few adapters of one rank, side by side."""

    def __init__(self, sizes: Sequence[tuple[str, int, int]], rank: int, device: torch.device) -> None:
        self.rank = rank
        shapes: dict[str, Shape] = {}
        offset = 0
        for name, fan_in, fan_out in sizes:
            shapes[name] = Shape(name, fan_in, fan_out, offset)
            offset += rank * (fan_in + fan_out)
        self.shapes = shapes
        rows = _ROWS_ON_CPU if device.type == "cpu" else _ROWS_ELSEWHERE
        self.weights = torch.zeros(rows, offset, dtype=torch.float32, device=device)
        """(rows, size): one flat adapter a row."""
        self._free = list(range(rows - 1, -1, -1))

    @property
    def full(self) -> bool:
        return not self._free

    def take(self) -> int:
        """A row of zeros."""
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self.weights[row].zero_()
        self._free.append(row)

    def a(self, name: str, first: int, count: int) -> Tensor:
        """A matrices of `count` rows from `first`: a view (count, rank, in)."""
        shape, size = self.shapes[name], self.weights.shape[1]
        return self.weights.as_strided(
            (count, self.rank, shape.fan_in), (size, shape.fan_in, 1), first * size + shape.offset
        )

    def b(self, name: str, first: int, count: int) -> Tensor:
        """B matrices of `count` rows from `first`: a view (count, out, rank)."""
        shape, size = self.shapes[name], self.weights.shape[1]
        start = first * size + shape.offset + self.rank * shape.fan_in
        return self.weights.as_strided((count, shape.fan_out, self.rank), (size, self.rank, 1), start)


class Adapter:
    """One policy's LoRA weights, in a row of `pool`.

    `flat` (size,) holds every A and B; `grad` (size,) their gradients, present only on adapters in training.
    """

    def __init__(self, pool: AdapterPool, alpha: float, *, trainable: bool) -> None:
        self.pool, self.row = pool, pool.take()
        weakref.finalize(self, pool.give_back, self.row).atexit = False  # whoever lets go of it frees its row
        self.rank, self.alpha = pool.rank, alpha
        rank = self.rank
        self.shapes = tuple(pool.shapes.values())
        self.flat = pool.weights[self.row]
        self.grad = torch.zeros_like(self.flat) if trainable else None
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for shape in self.shapes:
            for store, view in ((self.a, shape.a), (self.b, shape.b)):
                # a leaf that shares storage with `flat`; its .grad shares storage with `grad`
                leaf = view(self.flat, rank).detach()
                if self.grad is not None:
                    leaf.requires_grad_(True)
                    leaf.grad = view(self.grad, rank)
                store[shape.name] = leaf

        self._cast: tuple[torch.dtype, Cast] | None = None
        self.changes = 0
        """How often the weights changed."""

    def factors(self, dtype: torch.dtype) -> Cast:
        """A (rank, in) and B transposed (rank, out), both contiguous, of every layer, without gradient, in the base's
        `dtype`; copies, kept until `touch`, but for A in float32."""
        cast = self._cast  # another thread may forget it meanwhile
        if cast is None or cast[0] != dtype:
            flat, rank = self.flat.detach(), self.rank
            # each by itself: views of a copy of everything would keep B twice
            found = Cast(
                (shape.name, (shape.a(flat, rank).to(dtype), shape.b(flat, rank).to(dtype).t().contiguous()))
                for shape in self.shapes
            )
            cast = self._cast = dtype, found
        return cast[1]

    def gradients(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Those of a layer's A (rank, in) and B (out, rank), to be added to; None: the adapter is not trained."""
        a, b = self.a[name].grad, self.b[name].grad
        return None if a is None or b is None else (a, b)

    def touch(self) -> None:
        """The weights changed: copies of them are forgotten."""
        self._cast = None
        self.changes += 1

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
        self.touch()


Segment = tuple[Adapter, int, int]
"""Packed tokens [start, end) go through this adapter."""
