"""Packing token sequences into a prefix forest: every distinct (policy, prefix) is one packed token.

Sequences are sorted by (policy, tokens); that order is the depth-first order of their prefix tree, so consecutive
sequences share the longest prefixes, each sequence adds only the tokens after the prefix it shares with the one
before, and the tokens of each policy are contiguous. A prompt shared by sixteen answers is packed once.

Invariants: unpacking gives back every sequence; a packed token's ancestors are exactly the tokens before it in
every sequence it belongs to; no two packed tokens have the same policy and path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.lm.attention import Block, TreePlan
from coterie.lm.native.operands import Sights

BLOCK_TOKENS = 192
"""Queries a block of attention aims at: larger blocks waste work on masked keys, smaller ones on overhead."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Packed sequences of one pass."""

    token_ids: NDArray[np.int64]
    """(T,)"""
    positions: NDArray[np.int64]
    """(T,) depth of each token in its sequence."""
    segments: tuple[tuple[int, int, int], ...]
    """(policy, start, end) for each policy present, in order."""
    paths: tuple[NDArray[np.int64], ...]
    """For each sequence, in the order given, the packed index of each of its tokens."""
    blocks: tuple[Block, ...]
    sights: Sights

    @property
    def size(self) -> int:
        return len(self.token_ids)

    @property
    def parents(self) -> NDArray[np.int64]:
        """(T,): the packed token before each one in its sequences; -1: there is none."""
        first, seen = self.sights.first.numpy(), self.sights.seen.numpy()
        before = self.sights.slots.numpy()[first + np.maximum(seen - 2, 0)]
        return np.where(seen > 1, before, -1)

    def plan(self) -> TreePlan:
        return TreePlan(self.blocks, self.sights)


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


def pack(sequences: Sequence[tuple[int, tuple[int, ...]]], block_tokens: int = BLOCK_TOKENS) -> Forest:
    """Pack (policy, token ids) sequences. Raises ValueError for an empty sequence."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    ids: list[int] = []
    positions: list[int] = []
    paths: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(sequences)
    parts: list[tuple[int, int, NDArray[np.int64]]] = []
    segments: list[tuple[int, int, int]] = []
    previous: tuple[int, tuple[int, ...]] | None = None
    path = np.empty(0, np.int64)
    for i in order:
        policy, tokens = sequences[i]
        if not tokens:
            raise ValueError(f"sequence {i} is empty")
        same = previous is not None and previous[0] == policy
        kept = shared_prefix(previous[1], tokens) if same and previous is not None else 0
        start = len(ids)
        if kept < len(tokens):
            ids.extend(tokens[kept:])
            positions.extend(range(kept, len(tokens)))
            path = np.concatenate([path[:kept], np.arange(start, len(ids))])
            parts.append((start, len(ids), path))
        if not same:
            segments.append((policy, start, len(ids)))
        else:
            segments[-1] = (policy, segments[-1][1], len(ids))
        # a sequence that ends inside the one before keeps the longer path open for the next one
        paths[i] = path[: len(tokens)]
        if kept < len(tokens) or not same:
            previous = (policy, tokens)
    starts = {start for _, start, _ in segments}
    return Forest(
        np.array(ids, np.int64),
        np.array(positions, np.int64),
        tuple(segments),
        tuple(paths),
        tuple(_blocks(parts, starts, block_tokens)),
        _sights(parts, len(ids)),
    )


def _sights(parts: Sequence[tuple[int, int, NDArray[np.int64]]], tokens: int) -> Sights:
    """The path of every packed token; tokens [start, end) of a part have beginnings of the same list."""
    first, seen = np.zeros(tokens, np.int64), np.zeros(tokens, np.int32)
    at = 0
    for start, end, path in parts:
        first[start:end] = at
        seen[start:end] = np.arange(len(path) - (end - start), len(path)) + 1
        at += len(path)
    slots = np.concatenate([path for _, _, path in parts]).astype(np.int32)
    return Sights(torch.from_numpy(slots), torch.from_numpy(first), torch.from_numpy(seen), int(seen.max()))


def _blocks(parts: Sequence[tuple[int, int, NDArray[np.int64]]], policy_starts: set[int], size: int) -> list[Block]:
    """Cut the packed tokens into blocks at part borders, never across policies."""
    blocks: list[Block] = []
    open_parts: list[tuple[int, int, NDArray[np.int64]]] = []

    def close() -> None:
        if open_parts:
            blocks.append(_block(open_parts))
            open_parts.clear()

    for part in parts:
        if open_parts and (part[0] in policy_starts or part[1] - open_parts[0][0] > size):
            close()
        open_parts.append(part)
    close()
    return blocks


def _block(parts: Sequence[tuple[int, int, NDArray[np.int64]]]) -> Block:
    # In depth-first order every ancestor outside the block lies on the path of the block's first token.
    start, end = parts[0][0], parts[-1][1]
    first_path = parts[0][2]
    outside = first_path[first_path < start]
    column = {int(index): n for n, index in enumerate(outside)}
    visible = np.zeros((end - start, len(outside) + end - start), bool)
    for part_start, part_end, path in parts:
        columns = np.array([column[int(p)] if p < start else len(outside) + int(p) - start for p in path])
        new = part_end - part_start
        kept = len(path) - new
        rows = slice(part_start - start, part_end - start)
        visible[rows, columns[:kept]] = True
        visible[rows, columns[kept:]] = np.tri(new, dtype=bool)
    ancestors: list[tuple[int, int]] = []
    for index in outside.tolist():
        if ancestors and ancestors[-1][1] == index:
            ancestors[-1] = (ancestors[-1][0], index + 1)
        else:
            ancestors.append((index, index + 1))
    return Block(start, end, tuple(ancestors), torch.from_numpy(visible))


def split(sequences: Sequence[tuple[int, tuple[int, ...]]], tokens_per_pass: int) -> list[list[int]]:
    """Indices of `sequences` grouped into passes of at most `tokens_per_pass` packed tokens each.

    Sequences stay in prefix order, so that what shares a prefix shares a pass. A single sequence longer than the
    limit is a pass of its own.
    """
    passes: list[list[int]] = []
    used = 0
    previous: tuple[int, tuple[int, ...]] | None = None
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        policy, tokens = sequences[i]
        shared = shared_prefix(previous[1], tokens) if previous is not None and previous[0] == policy else 0
        new = len(tokens) - shared
        if not passes or used + new > tokens_per_pass:
            passes.append([])
            used, new = 0, len(tokens)
        passes[-1].append(i)
        used += new
        previous = (policy, tokens)
    return passes
