"""Packing: unpacking gives back every sequence, nothing is packed twice, and attention sees exactly the own path."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.lm.forest import pack, split

# few distinct tokens, so that prefixes are shared often
_sequences = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple)),
    min_size=1,
    max_size=14,
)


@given(_sequences, st.integers(1, 12))
def test_unpacking_gives_back_every_sequence(sequences: list[tuple[int, tuple[int, ...]]], block: int) -> None:
    forest = pack(sequences, block)
    policy_of = np.empty(forest.size, np.int64)
    for policy, start, end in forest.segments:
        policy_of[start:end] = policy
    for (policy, tokens), path in zip(sequences, forest.paths, strict=True):
        assert tuple(forest.token_ids[path]) == tokens
        assert tuple(forest.positions[path]) == tuple(range(len(tokens)))
        assert set(policy_of[path]) == {policy}


@given(_sequences)
def test_every_distinct_prefix_is_packed_once(sequences: list[tuple[int, tuple[int, ...]]]) -> None:
    distinct = {(policy, tokens[:n]) for policy, tokens in sequences for n in range(1, len(tokens) + 1)}
    assert pack(sequences).size == len(distinct)


@given(_sequences, st.integers(1, 12))
def test_attention_sees_exactly_the_own_path(sequences: list[tuple[int, tuple[int, ...]]], block: int) -> None:
    forest = pack(sequences, block)
    seen = torch.zeros(forest.size, forest.size, dtype=torch.bool)
    for b in forest.blocks:
        columns = [i for start, end in (*b.ancestors, (b.start, b.end)) for i in range(start, end)]
        seen[b.start : b.end, columns] = b.visible
    for path in forest.paths:
        for n, index in enumerate(path):
            assert seen[index].nonzero().flatten().tolist() == sorted(path[: n + 1].tolist())


@settings(max_examples=50)
@given(_sequences, st.integers(1, 20))
def test_passes_hold_every_sequence_once_and_keep_to_the_budget(
    sequences: list[tuple[int, tuple[int, ...]]], budget: int
) -> None:
    passes = split(sequences, budget)
    assert sorted(i for chosen in passes for i in chosen) == list(range(len(sequences)))
    for chosen in passes:
        if len(chosen) > 1:
            assert pack([sequences[i] for i in chosen]).size <= budget
