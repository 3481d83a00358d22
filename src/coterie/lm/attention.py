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
class Bucket:
    """Rows of similar length: row b asks `queries[b]` (packed indices) and sees cache slots `keys[b]`."""

    queries: Tensor
    """int64 (rows, query_length), padded with 0."""
    keys: Tensor
    """int64 (rows, key_length), padded with slot 0."""
    mask: Tensor
    """float (rows, query_length, key_length): 0 where visible, -inf where not."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """New tokens written to cache slots; keys read back by slot. Inference only."""

    keys: Sequence[Tensor]
    """One pool per layer, (slots, kv_heads, dim)."""
    values: Sequence[Tensor]
    slots: Tensor
    """int64 (T,): where each packed token's key and value go."""
    buckets: tuple[Bucket, ...]
    order: Tensor
    """int64 (T,): position of each packed token in the concatenated, padded bucket outputs."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        pool_k, pool_v = self.keys[layer], self.values[layer]
        pool_k.index_copy_(0, self.slots, k)
        pool_v.index_copy_(0, self.slots, v)
        heads, kv_heads, dim = q.shape[1], k.shape[1], k.shape[2]
        group = heads // kv_heads
        outputs = []
        for bucket in self.buckets:
            rows, lq = bucket.queries.shape
            lk = bucket.keys.shape[1]
            queries = q.index_select(0, bucket.queries.flatten()).view(rows, lq, kv_heads, group, dim)
            queries = queries.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * lq, dim)
            keys = pool_k.index_select(0, bucket.keys.flatten()).view(rows, lk, kv_heads, dim).permute(0, 2, 3, 1)
            values = pool_v.index_select(0, bucket.keys.flatten()).view(rows, lk, kv_heads, dim).permute(0, 2, 1, 3)
            scores = torch.matmul(queries, keys).mul_(scale).view(rows, kv_heads, group, lq, lk)
            scores += bucket.mask[:, None, None].to(scores.dtype)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype).view(rows, kv_heads, group * lq, lk)
            out = torch.matmul(weights, values).view(rows, kv_heads, group, lq, dim)
            outputs.append(out.permute(0, 3, 1, 2, 4).reshape(rows * lq, heads, dim))
        return torch.cat(outputs).index_select(0, self.order)
