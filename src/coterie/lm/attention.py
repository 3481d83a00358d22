"""Attention over prefix trees, plugged into transformers' `AttentionInterface`.

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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION_NAME = "coterie_tree"


class Plan(Protocol):
    """Which keys each packed token sees."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (T, heads, dim), k and v (T, kv_heads, dim) of the packed tokens -> (T, heads, dim)."""
        ...


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function transformers calls: query (1, heads, T, dim), key and value (1, kv_heads, T, dim)."""
    plan: Plan = kwargs["plan"]
    out = plan.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        kwargs["scaling"],
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Make `coterie_tree` known to transformers; safe to call again."""
    AttentionInterface.register(ATTENTION_NAME, _forward)


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
    masks: dict[tuple[int, torch.dtype], Tensor]
    """Additive masks by (block, dtype), filled at the first layer and used by all."""

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> TreePlan:
        return cls(tuple(blocks), {})

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        group = heads // kv_heads
        outputs = []
        for number, block in enumerate(self.blocks):
            slices = [*block.ancestors, (block.start, block.end)]
            keys = torch.cat([k[a:b] for a, b in slices]) if block.ancestors else k[block.start : block.end]
            values = torch.cat([v[a:b] for a, b in slices]) if block.ancestors else v[block.start : block.end]
            n = block.end - block.start
            # (n, kv, group, dim) -> (1, kv, group * n, dim): queries of one key head side by side
            queries = q[block.start : block.end].view(n, kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
            mask = self.masks.get((number, q.dtype))
            if mask is None:
                additive = torch.zeros(block.visible.shape, dtype=q.dtype, device=q.device)
                additive.masked_fill_(~block.visible, float("-inf"))
                mask = additive.repeat(group, 1)[None, None]
                self.masks[number, q.dtype] = mask
            out = functional.scaled_dot_product_attention(
                queries[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask, scale=scale
            )
            outputs.append(out.view(kv_heads, group, n, -1).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(outputs)


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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
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
