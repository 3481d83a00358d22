"""Which packed tokens go through which adapter, and how their low-rank updates are added when no gradient is wanted.

Adapters of one rank lie side by side in a pool, so the same layer of several of them is a batch of matrices: where
their ranges of tokens are equally long, two batched products serve all of them; where they are not, short ranges are
padded to one length first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from coterie.lm.adapter import AdapterPool, Segment
from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Addresses, Ranges

PADDED_SEGMENTS = 6
"""Ranges of unlike length from which padding them is quicker than one after the other."""
COMPILED_RANK = 16
"""Rank up to which the compiled kernel is quicker than matrix products, whose inner dimension is too short for them."""
PADDED_TOKENS = 48
"""Tokens a range up to which that holds."""


@dataclass(frozen=True, slots=True)
class Padding:
    """How ranges of unlike length are brought to one."""

    index: Tensor
    """int64 (adapters * length,): packed token of each place; padding repeats token 0."""
    tokens: Tensor
    """int64 (n,): packed tokens that are in these ranges."""
    places: Tensor
    """int64 (n,): where they stand in the padded order."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Ranges of neighbouring adapters of one pool."""

    pool: AdapterPool
    first: int
    """Row of the first adapter."""
    count: int
    length: int
    """Tokens of each range, padding included."""
    start: int
    """First packed token; the ranges follow each other from here if they are not padded."""
    scaling: float | Tensor
    """One for all, or (adapters, 1, 1)."""
    padding: Padding | None

    def add_updates(self, x: Tensor, outs: Sequence[tuple[str, Tensor]]) -> None:
        """See `Route.add_updates`."""
        if self.padding is None:
            end = self.start + self.count * self.length
            rows = x[self.start : end].view(self.count, self.length, -1)
        else:
            rows = x.index_select(0, self.padding.index).view(self.count, self.length, -1)
        alpha = self.scaling if isinstance(self.scaling, float) else 1.0
        for name, out in outs:
            a = self.pool.a(name, self.first, self.count).to(x.dtype).transpose(1, 2)
            b = self.pool.b(name, self.first, self.count).to(x.dtype).transpose(1, 2)
            inner = torch.bmm(rows, a)
            if isinstance(self.scaling, Tensor):
                inner.mul_(self.scaling)
            if self.padding is None:
                out[self.start : end].view(self.count, self.length, -1).baddbmm_(inner, b, alpha=alpha)
            else:
                update = torch.bmm(inner, b).view(self.count * self.length, -1)
                out.index_add_(0, self.padding.tokens, update.index_select(0, self.padding.places), alpha=alpha)


class Route:
    """The ranges of the pass under way; every adapted layer of a model reads the same one."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.segments: tuple[Segment, ...] = ()
        self._kernels = kernels
        self._single: tuple[Segment, ...] = ()
        self._batched: tuple[Batched, ...] = ()
        self._low: Ranges | None = None
        self._known: Addresses | None = None
        """Of an earlier pass: decoding asks for the same adapters again and again."""

    def lead(self, segments: Sequence[Segment], device: torch.device) -> None:
        """From now on packed tokens [start, end) of each segment go through its adapter."""
        self.segments = tuple(segments)
        self._single, self._batched = (), ()
        self._low = None
        if self._kernels is not None:
            low = [segment for segment in segments if segment[0].rank <= COMPILED_RANK]
            self._single = tuple(segment for segment in segments if segment[0].rank > COMPILED_RANK)
            if low:
                self._low = Ranges(low, self._kernels.dtype, self._known)
                self._known = self._low.addresses
        elif torch.is_grad_enabled():
            self._single = self.segments
        else:
            self._single, self._batched = _divide(segments, device)

    @property
    def one_by_one(self) -> tuple[Segment, ...]:
        """Of a pass with gradients: segments that matrix products serve."""
        return self._single

    @property
    def compiled(self) -> tuple[Kernels, Ranges] | None:
        """Of a pass with gradients: what the compiled kernel serves, if there is any."""
        return (self._kernels, self._low) if self._kernels is not None and self._low is not None else None

    def add_updates(self, x: Tensor, outs: Sequence[tuple[str, Tensor]]) -> None:
        """Add (alpha / rank) (x A^T) B^T of every range to what the layers `outs` (name, (tokens, out)) made of
        x (tokens, in), in place and without gradient."""
        for adapter, start, end in self._single:
            factors, own = adapter.factors(x.dtype), x[start:end]
            for name, out in outs:
                a, b_t = factors[name]
                out[start:end].addmm_(functional.linear(own, a), b_t, alpha=adapter.scaling)
        for group in self._batched:
            group.add_updates(x, outs)
        if self.compiled is not None:
            kernels, ranges = self.compiled
            kernels.add_low_rank(x, outs, ranges)


def _divide(segments: Sequence[Segment], device: torch.device) -> tuple[tuple[Segment, ...], tuple[Batched, ...]]:
    """Segments to be applied one after the other, and runs of those whose adapters are neighbours in a pool."""
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
        tokens = sum(end - start for _, start, end in run)
        if len(run) > 1 and _even(run):
            batched.append(_batched(run, device))
        elif len(run) < PADDED_SEGMENTS or tokens > PADDED_TOKENS * len(run):
            single.extend(run)
        else:
            batched.append(_batched(run, device))
    return tuple(single), tuple(batched)


def _even(run: Sequence[Segment]) -> bool:
    """Whether ranges are equally long and follow each other in the order of their adapters."""
    _, first, end = run[0]
    length = end - first
    return all((a, b) == (first + n * length, first + (n + 1) * length) for n, (_, a, b) in enumerate(run))


def _batched(run: Sequence[Segment], device: torch.device) -> Batched:
    length = max(end - start for _, start, end in run)
    scalings = [adapter.scaling for adapter, _, _ in run]
    alike = len(set(scalings)) == 1
    first = run[0][0]
    return Batched(
        first.pool,
        first.row,
        len(run),
        length,
        run[0][1],
        scalings[0] if alike else torch.tensor(scalings)[:, None, None].to(device),
        None if _even(run) else _padding(run, length, device),
    )


def _padding(run: Sequence[Segment], length: int, device: torch.device) -> Padding:
    index = torch.zeros(len(run), length, dtype=torch.int64)
    tokens, places = [], []
    for number, (_, start, end) in enumerate(run):
        index[number, : end - start] = torch.arange(start, end)
        tokens.append(torch.arange(start, end))
        places.append(torch.arange(number * length, number * length + end - start))
    return Padding(index.flatten().to(device), torch.cat(tokens).to(device), torch.cat(places).to(device))
