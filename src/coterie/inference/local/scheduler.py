"""What to compute next: from the nodes requests wait for to passes of packed tokens and their attention plan.

A pass takes the waiting nodes in order of arrival, adds whatever of their paths is not in the cache, and stops at a
token budget. New tokens form chains; each chain is one row of attention, and rows of similar length share a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.inference.local.cache import Node
from coterie.lm.attention import Bucket
from coterie.types import AdapterVersion


@dataclass(frozen=True, slots=True)
class Pass:
    """New tokens of one forward pass, grouped by adapter version."""

    nodes: tuple[Node, ...]
    """In packed order; a parent comes before its children."""
    segments: tuple[tuple[AdapterVersion | None, int, int], ...]
    """(version, start, end)."""
    wanted: tuple[int, ...]
    """Packed indices whose hidden states are asked for."""
    served: int
    """How many of the waiting nodes this pass serves."""


def plan_pass(waiting: Sequence[tuple[AdapterVersion | None, Node]], budget: int) -> Pass:
    """Choose the first waiting nodes whose missing tokens fit `budget` (at least one of them)."""
    chosen: dict[AdapterVersion | None, list[Node]] = {}
    seen: set[int] = set()
    wanted: list[Node] = []
    total = served = 0
    for version, node in waiting:
        missing: list[Node] = []
        step: Node | None = node
        while step is not None and step.depth >= 0 and step.slot < 0 and id(step) not in seen:
            missing.append(step)
            step = step.parent
        # a node whose slot survived but whose hidden state was never asked for is computed again
        again = not missing and id(node) not in seen
        if total and total + len(missing) + again > budget:
            break
        group = chosen.setdefault(version, [])
        for new in [node] if again else reversed(missing):
            group.append(new)
            seen.add(id(new))
        total += len(missing) + again
        wanted.append(node)
        served += 1
    nodes: list[Node] = []
    segments = []
    for version, group in chosen.items():
        if group:
            segments.append((version, len(nodes), len(nodes) + len(group)))
            nodes.extend(group)
    index = {id(node): i for i, node in enumerate(nodes)}
    return Pass(tuple(nodes), tuple(segments), tuple(index[id(node)] for node in wanted), served)


def attention_rows(nodes: Sequence[Node]) -> list[tuple[list[int], list[int]]]:
    """Rows of (packed indices of a chain's new tokens, cache slots of its whole path), for nodes that have slots."""
    index = {id(node): i for i, node in enumerate(nodes)}
    children: dict[int, int] = {}
    for node in nodes:
        if id(node.parent) in index:
            children[id(node.parent)] = children.get(id(node.parent), 0) + 1
    chains: dict[int, list[int]] = {}
    ends: dict[int, Node] = {}
    head_of: dict[int, int] = {}
    for i, node in enumerate(nodes):
        parent = id(node.parent)
        if parent in index and children[parent] == 1:
            head = head_of[parent]
        else:
            head = i
            chains[head] = []
        head_of[id(node)] = head
        chains[head].append(i)
        ends[head] = node
    return [(chain, [step.slot for step in ends[head].path()]) for head, chain in chains.items()]


def buckets(
    rows: Sequence[tuple[list[int], list[int]]], tokens: int, device: torch.device
) -> tuple[tuple[Bucket, ...], Tensor]:
    """Pad rows of similar length together; also the position of each packed token in the padded outputs."""
    groups: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        groups.setdefault((_rounded(len(row[0])), _rounded(len(row[1]))), []).append(row)
    made = []
    order = torch.zeros(tokens, dtype=torch.int64)
    base = 0
    for group in groups.values():
        lq = max(len(q) for q, _ in group)
        lk = max(len(k) for _, k in group)
        queries = torch.tensor([q + [0] * (lq - len(q)) for q, _ in group])
        keys = torch.tensor([k + [0] * (lk - len(k)) for _, k in group])
        q_len = torch.tensor([len(q) for q, _ in group])[:, None, None]
        k_len = torch.tensor([len(k) for _, k in group])[:, None, None]
        # query i of a row is the (k_len - q_len + i)-th token of its path; padded queries see the first key only
        last = (k_len - q_len + torch.arange(lq)[None, :, None]).clamp(max=k_len - 1)
        visible = torch.arange(lk)[None, None, :] <= last
        mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        for number, (q, _) in enumerate(group):
            order[q] = torch.arange(base + number * lq, base + number * lq + len(q))
        base += len(group) * lq
        made.append(Bucket(queries.to(device), keys.to(device), mask.to(device)))
    return tuple(made), order.to(device)


def _rounded(length: int) -> int:
    """Lengths that may share a bucket: up to a quarter of padding."""
    if length <= 4:
        return length
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step
