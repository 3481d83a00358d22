"""What to compute next: from the nodes requests wait for to passes of packed tokens and their attention plan.

A pass takes the waiting nodes in order of arrival, adds whatever of their paths is not in the cache, and stops at a
token budget. New tokens form chains; each chain is one row of attention, and rows of similar length share a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coterie.inference.local.cache import Node
from coterie.lm.attention import Bucket, Trunk
from coterie.lm.native.operands import Sights
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


def plan_pass(
    waiting: Sequence[tuple[AdapterVersion | None, Node]],
    budget: int,
    place: Callable[[AdapterVersion | None], int] = lambda version: 0,
) -> Pass:
    """Choose the first waiting nodes whose missing tokens fit `budget` (at least one of them).

    Versions are laid in the order of their `place`, those of the same place as they come.
    """
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
    for version in sorted(chosen, key=place):
        group = chosen[version]
        if group:
            segments.append((version, len(nodes), len(nodes) + len(group)))
            nodes.extend(group)
    index = {id(node): i for i, node in enumerate(nodes)}
    return Pass(tuple(nodes), tuple(segments), tuple(index[id(node)] for node in wanted), served)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of attention: the new tokens of a chain and what they see."""

    queries: list[int]
    """Packed indices of the chain's new tokens."""
    keys: list[int]
    """Cache slots of the whole path."""
    trunk: Node | None = None
    """Last token of what the row shares with its siblings; a row with one only asks a single new token."""


def attention_rows(nodes: Sequence[Node]) -> list[Row]:
    """The rows of new tokens, for nodes that have slots."""
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
    return [
        Row(
            chain,
            ends[head].slots(),
            ends[head].trunk if len(chain) == 1 and id(ends[head].trunk) not in index else None,
        )
        for head, chain in chains.items()
    ]


LONGEST_LISTED = 512
"""Keys a chain of several new tokens may see for lists to be quicker than products of whole matrices."""


def sights(rows: Sequence[Row], tokens: int) -> Sights | None:
    """What each of so many new tokens sees, as lists; None where a row has many tokens that see many keys."""
    if any(len(row.queries) > 1 and len(row.keys) > LONGEST_LISTED for row in rows):
        return None
    first, seen = np.zeros(tokens, np.int64), np.zeros(tokens, np.int32)
    listed: list[int] = []
    for row in rows:
        begins, length, new = len(listed), len(row.keys), len(row.queries)
        listed += row.keys
        if new == 1:
            first[row.queries[0]], seen[row.queries[0]] = begins, length
        else:
            first[row.queries] = begins
            seen[row.queries] = np.arange(length - new + 1, length + 1)
    return Sights(
        torch.tensor(listed, dtype=torch.int32),
        torch.from_numpy(first),
        torch.from_numpy(seen),
        int(seen.max()),
    )


TRUNK_TOKENS = 24
"""Shared tokens from which reading them once for all rows is worth two more products a layer."""


def buckets(rows: Sequence[Row], tokens: int, device: torch.device) -> tuple[tuple[Bucket, ...], Tensor | None]:
    """Pad rows of similar length together; also the position of each packed token in the padded outputs."""
    families: dict[int, list[Row]] = {}
    for row in rows:
        if row.trunk is not None and row.trunk.depth + 1 >= TRUNK_TOKENS:
            families.setdefault(id(row.trunk), []).append(row)
    shared = {id(row) for family in families.values() if len(family) > 1 for row in family}
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if id(row) not in shared:
            lq, lk = len(row.queries), len(row.keys)
            groups.setdefault((_rounded(lq), _rounded(lk) if lq > 1 else _power(lk)), []).append(row)
    made = [_bucket(group, [], device) for group in groups.values()]
    # siblings stand together, families of similar length in one bucket
    together: dict[tuple[int, int], list[list[Row]]] = {}
    for family in families.values():
        if len(family) > 1:
            trunk = family[0].trunk
            assert trunk is not None
            own = max(len(row.keys) for row in family) - trunk.depth - 1
            together.setdefault((_power(trunk.depth + 1), _power(own)), []).append(family)
    made.extend(_bucket([row for family in some for row in family], some, device) for some in together.values())
    order = np.zeros(tokens, np.int64)
    base = 0
    for bucket, group in made:
        for row in group:
            order[row.queries] = np.arange(base, base + len(row.queries))
            base += bucket.query_length
    if len(made) == 1 and base == tokens and (order == np.arange(tokens)).all():
        return (replace(made[0][0], queries=None),), None
    return tuple(bucket for bucket, _ in made), torch.from_numpy(order).to(device)


def _bucket(group: list[Row], families: Sequence[list[Row]], device: torch.device) -> tuple[Bucket, list[Row]]:
    """One bucket of `group`; with `families`, its rows in that order, each family sharing its trunk."""
    shared = [0] * len(group)
    trunks = []
    first = 0
    for family in families:
        node = family[0].trunk
        assert node is not None
        length = node.depth + 1
        trunks.append(Trunk((first, first + len(family)), _run_of(node.slots(), device), length))
        shared[first : first + len(family)] = [length] * len(family)
        first += len(family)
    front = max(shared, default=0)
    lq = max(len(row.queries) for row in group)
    own = [len(row.keys) - s for row, s in zip(group, shared, strict=True)]
    lk = max(own)
    queries = np.zeros((len(group), lq), np.int64)
    keys = np.zeros((len(group), lk), np.int64)
    for number, (row, s, n) in enumerate(zip(group, shared, own, strict=True)):
        queries[number, : len(row.queries)] = row.queries
        keys[number, :n] = row.keys[s:]
    mask = None
    if lq > 1 or min(own) < lk or (families and min(shared) < front):
        q_len = np.array([len(row.queries) for row in group])[:, None, None]
        k_len = np.array(own)[:, None, None]
        # query i of a row is the (k_len - q_len + i)-th of its own keys; padded queries see the first key only
        last = np.minimum(k_len - q_len + np.arange(lq)[None, :, None], k_len - 1)
        visible = np.arange(lk)[None, None, :] <= last
        if front:
            seen = np.arange(front)[None, None, :] < np.array(shared)[:, None, None]
            visible = np.concatenate([np.broadcast_to(seen, (len(group), lq, front)), visible], axis=2)
        mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), float("-inf")).to(device)
    made = Bucket(
        torch.from_numpy(queries.reshape(-1)).to(device),
        len(group),
        lq,
        torch.from_numpy(keys).to(device),
        tuple(trunks),
        mask,
    )
    return made, group


def _run_of(slots: list[int], device: torch.device) -> Tensor | tuple[int, int]:
    """Slots as [start, end) when they lie side by side."""
    if slots[-1] - slots[0] == len(slots) - 1 and all(b - a == 1 for a, b in pairwise(slots)):
        return slots[0], slots[-1] + 1
    return torch.tensor(slots, device=device)


def _rounded(length: int) -> int:
    """Lengths that may share a bucket of several queries a row: up to a quarter of padding."""
    if length <= 4:
        return length
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step


def _power(length: int) -> int:
    """Lengths that may share a bucket of single queries: few buckets matter more than little padding."""
    return 1 << max(4, (length - 1).bit_length())
