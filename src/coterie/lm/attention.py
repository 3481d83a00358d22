"""Attention over prefix trees.

A forward pass here never has a batch dimension: all new tokens of all sequences of all policies lie in one row of
T packed tokens, and a *plan* says which keys each of them may see. There are two plans. `TreePlan` (learner) keeps
tokens in depth-first order of their prefix tree, so that every block of queries reads a few contiguous slices of
keys; autograd then needs no scatter. `CachePlan` (engine) reads keys from slots of a preallocated cache, in padded
buckets of rows. Both give exactly causal attention along each sequence's own path, to float rounding.

Grouped-query attention is computed without expanding keys: the G query heads of one key head are laid side by side
along the query axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from coterie.lm.functions import side_by_side
from coterie.lm.native.kernels import Kernels, kernels_for
from coterie.lm.native.operands import Sights


class Plan(Protocol):
    """Which keys each packed token sees."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, known: Tensor | None = None) -> Tensor:
        """q (T, heads, dim), k and v (T, kv_heads, dim) of the packed tokens -> (T, heads, dim): `known`, if that was
        computed before."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [start, end) of the packed tokens; keys are the slices of `ancestors` and then [start, end)."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]
    visible: Tensor
    """bool (end - start, keys): which keys each query sees."""


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Packed tokens in depth-first order of their prefix tree, cut into blocks of queries."""

    blocks: tuple[Block, ...]
    sights: Sights
    """In place of blocks, where kernels are compiled for the model's heads."""
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    """Additive masks by (block, dtype), filled at the first layer and used by all; where nothing is compiled."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, known: Tensor | None = None) -> Tensor:
        kernels = kernels_for(q.dtype, q.device)
        if kernels is not None and kernels.attends_trees(q.shape[1], k.shape[1], q.shape[2]):
            listed: Tensor = _ListedAttention.apply(kernels, self.sights, q, k, v, scale, known)  # type: ignore[no-untyped-call]
            return listed
        out: Tensor = _TreeAttention.apply(self, q, k, v, scale, known)  # type: ignore[no-untyped-call]
        return out

    def mask(self, number: int, like: Tensor) -> Tensor:
        """Of block `number`: (1, n, keys), 0 where visible and -inf where not."""
        found = self.masks.get((number, like.dtype))
        if found is None:
            visible = self.blocks[number].visible
            additive = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            additive.masked_fill_(~visible.to(like.device), float("-inf"))
            found = self.masks[number, like.dtype] = additive[None]
        return found


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """(n, heads, dim) -> (kv_heads, group * n, dim), contiguous"""
    n, heads, dim = x.shape
    return x.reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim).contiguous()


def _by_token(x: Tensor, n: int) -> Tensor:
    """(kv_heads, group * n, dim) -> (n, heads, dim)"""
    kv_heads, _, dim = x.shape
    return x.view(kv_heads, -1, n, dim).permute(2, 0, 1, 3).reshape(n, -1, dim)


def _seen(block: Block, x: Tensor) -> Tensor:
    """Keys or values (T, kv_heads, dim) that a block sees: (kv_heads, keys, dim)."""
    own = x[block.start : block.end]
    return (torch.cat([*(x[a:b] for a, b in block.ancestors), own]) if block.ancestors else own).transpose(0, 1)


class _ListedAttention(torch.autograd.Function):
    """Attention of every token to the tokens it sees, one by one; probabilities are computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, see: Sights, q: Tensor, k: Tensor, v: Tensor, scale: float, known: Tensor | None
    ) -> Tensor:
        q, k, v = (side_by_side(part) for part in (q, k, v))
        out = kernels.attend_tree(q, k, v, see, scale) if known is None else known
        ctx.kernels, ctx.see, ctx.scale = kernels, see, scale
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor, None, None]:
        q, k, v, out = ctx.saved_tensors
        back = ctx.kernels.attend_tree_backward(grads[0].contiguous(), out, q, k, v, ctx.see, ctx.scale)
        return None, None, *back, None, None


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T scale + mask) v of every block; probabilities are computed again on the way back.

    With P the probabilities, O = P v:  dv = P^T dO,  dS = P (dO v^T - rowsum(dO O)),  dq = dS k,  dk = dS^T q
    (Dao et al., 2022). Gradients of keys are added up slice by slice: nothing the size of the pass is made per block.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: TreePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, known: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if known is None else known
        for number, block in enumerate(plan.blocks if known is None else ()):
            queries = _by_key_head(q[block.start : block.end], k.shape[1])
            weights = _weights(plan, number, queries, _seen(block, k), scale)
            out[block.start : block.end] = _by_token(torch.bmm(weights, _seen(block, v)), block.end - block.start)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        q, k, v, out = ctx.saved_tensors
        plan, scale, kv_heads = ctx.plan, ctx.scale, k.shape[1]
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
        grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
        for number, block in enumerate(plan.blocks):
            n = block.end - block.start
            queries = _by_key_head(q[block.start : block.end], kv_heads)
            asked = _by_key_head(grad[block.start : block.end], kv_heads)
            keys = _seen(block, k)
            weights = _weights(plan, number, queries, keys, scale)
            spread = torch.bmm(asked, _seen(block, v).transpose(1, 2))
            kernels = kernels_for(spread.dtype, spread.device)
            answered = _by_key_head(out[block.start : block.end], kv_heads)
            if kernels is not None:
                kernels.softmax_scores_backward(spread, weights, asked, answered, scale)
            else:
                along = torch.linalg.vecdot(asked, answered).unsqueeze(-1)
                spread.sub_(along).mul_(weights).mul_(scale)
            grad_q[block.start : block.end] = _by_token(torch.bmm(spread, keys), n)
            _add_slices(grad_k, block, torch.bmm(spread.transpose(1, 2), queries))
            _add_slices(grad_v, block, torch.bmm(weights.transpose(1, 2), asked))
        return None, grad_q, grad_k, grad_v, None, None


def _weights(plan: TreePlan, number: int, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Probabilities (kv_heads, group * n, keys) of one block."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    kv_heads, _, seen = scores.shape
    n = len(plan.blocks[number].visible)
    kernels = kernels_for(scores.dtype, scores.device)
    if kernels is not None:
        kernels.masked_softmax(scores.view(-1, n, seen), plan.blocks[number].visible, scale)
        return scores
    # one mask for all query heads
    torch.add(plan.mask(number, scores), scores.view(-1, n, seen), alpha=scale, out=scores.view(-1, n, seen))
    return scores.softmax(-1, dtype=torch.float32).to(queries.dtype).view(kv_heads, -1, seen)


def _add_slices(total: Tensor, block: Block, part: Tensor) -> None:
    """Add (kv_heads, keys, dim) of the keys a block sees to (T, kv_heads, dim)."""
    by_token, at = part.transpose(0, 1), 0
    for start, end in (*block.ancestors, (block.start, block.end)):
        total[start:end] += by_token[at : at + end - start]
        at += end - start


@dataclass(frozen=True, slots=True)
class Trunk:
    """Rows of a bucket that share their first tokens: those keys are read once for all of them."""

    rows: tuple[int, int]
    """Rows [start, end) of the bucket."""
    slots: Tensor | tuple[int, int]
    """int64 (length,) cache slots, or [start, end) where they lie side by side and nothing need be copied."""
    length: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of similar length: row b asks `queries[b]`; it sees the keys of its trunk and then cache slots `keys[b]`.

    Rows that answer the same prompt share a trunk, so a prompt asked by sixteen episodes is read once, not sixteen
    times. Scores of trunk and own keys are laid side by side and normalised together: the result is plain attention.
    """

    queries: Tensor | None
    """int64 (rows * query_length,), padded with 0; None: all packed tokens in order."""
    rows: int
    query_length: int
    keys: Tensor
    """int64 (rows, key_length), padded with slot 0."""
    trunks: tuple[Trunk, ...]
    mask: Tensor | None
    """float (rows, query_length, trunk length + key_length): 0 where visible, -inf where not; None: all visible."""

    @property
    def trunk_length(self) -> int:
        return max((trunk.length for trunk in self.trunks), default=0)


@dataclass(frozen=True, slots=True)
class CachePlan:
    """New tokens written to cache slots; keys read back by slot. Inference only."""

    keys: Sequence[Tensor]
    """One pool per layer, (kv_heads, slots, dim)."""
    values: Sequence[Tensor]
    slots: Tensor
    """int64 (T,): where each packed token's key and value go."""
    buckets: tuple[Bucket, ...]
    order: Tensor | None
    """int64 (T,): position of each packed token in the concatenated, padded bucket outputs; None: as they come."""
    sights: Sights | None = None
    """In place of buckets, where kernels are compiled and they are quicker: lists of cache slots."""

    def attend_compiled(
        self, kernels: Kernels, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float
    ) -> Tensor:
        """As `attend`, of queries and keys that are not rotated yet -> (T, heads * dim)."""
        see = self.sights
        assert see is not None
        return kernels.attend(q, k, v, cos, sin, self.keys[layer], self.values[layer], self.slots, see, scale)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, known: Tensor | None = None) -> Tensor:
        pool_k, pool_v = self.keys[layer], self.values[layer]
        pool_k.index_copy_(1, self.slots, k.transpose(0, 1))
        pool_v.index_copy_(1, self.slots, v.transpose(0, 1))
        kv_heads = k.shape[1]
        # (T, heads, dim) -> (kv, T, group, dim): the query heads of one key head lie side by side
        grouped = q.view(len(q), kv_heads, -1, q.shape[2]).transpose(0, 1) * scale
        outputs = [_attend(bucket, grouped, pool_k, pool_v) for bucket in self.buckets]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out if self.order is None else out.index_select(0, self.order)


def _attend(bucket: Bucket, q: Tensor, pool_k: Tensor, pool_v: Tensor) -> Tensor:
    """Attention of one bucket, q (kv, T, group, dim) already scaled -> (rows * query_length, heads, dim)."""
    kv, _, group, dim = q.shape
    rows, lq = bucket.rows, bucket.query_length
    own, shared = bucket.keys.shape[1], bucket.trunk_length
    if bucket.queries is not None:
        q = q.index_select(1, bucket.queries)
    # (kv * rows, group * lq, dim); for single queries this is a view of what the projection wrote
    queries = q.reshape(kv, rows, lq, group, dim).transpose(2, 3).reshape(kv * rows, group * lq, dim)
    places = bucket.keys.flatten()
    keys = pool_k.index_select(1, places).view(kv * rows, own, dim)
    values = pool_v.index_select(1, places).view(kv * rows, own, dim)
    if not shared:
        scores = torch.bmm(queries, keys.transpose(1, 2))
    else:
        scores = queries.new_zeros(kv * rows, group * lq, shared + own)
        scores[:, :, shared:] = torch.bmm(queries, keys.transpose(1, 2))
        by_row = scores.view(kv, rows, group * lq, shared + own)
        asked = queries.view(kv, rows, group * lq, dim)
        for trunk in bucket.trunks:
            a, b = trunk.rows
            found = torch.bmm(asked[:, a:b].reshape(kv, -1, dim), _slots(pool_k, trunk.slots).transpose(1, 2))
            by_row[:, a:b, :, : trunk.length] = found.view(kv, b - a, group * lq, trunk.length)
    if bucket.mask is not None:
        by_query = scores.view(kv, rows, group, lq, shared + own)
        by_query += bucket.mask[None, :, None].to(scores.dtype)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights[:, :, shared:], values)
    if shared:
        by_row = weights.view(kv, rows, group * lq, shared + own)
        summed = out.view(kv, rows, group * lq, dim)
        for trunk in bucket.trunks:
            a, b = trunk.rows
            part = by_row[:, a:b, :, : trunk.length].reshape(kv, -1, trunk.length)
            summed[:, a:b] += torch.bmm(part, _slots(pool_v, trunk.slots)).view(kv, b - a, group * lq, dim)
    # (kv, rows, group, lq, dim) -> (rows, lq, kv, group, dim)
    return out.view(kv, rows, group, lq, dim).permute(1, 3, 0, 2, 4).reshape(rows * lq, kv * group, dim)


def _slots(pool: Tensor, slots: Tensor | tuple[int, int]) -> Tensor:
    """Keys or values of a trunk: (kv, length, dim)."""
    if isinstance(slots, tuple):
        return pool[:, slots[0] : slots[1]]
    return pool.index_select(1, slots)
