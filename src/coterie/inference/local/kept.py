"""What rollout computed, for the learner that puts the same tokens through the same weights next.

    listening()  meanwhile passes hand their activations over, by reference, up to so many bytes
    recall()     those of a forest's tokens, if every one of them is there

Whatever empties the cache, publication above all, empties this with it: nothing is kept of older weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from coterie.inference.local.cache import Node, PrefixCache
from coterie.lm.activations import PassActivations, Recalled
from coterie.lm.forest import Forest
from coterie.lm.native.kernels import Kernels
from coterie.types import AdapterVersion


class Kept:
    """Activations of the passes that filled a cache."""

    def __init__(self, cache: PrefixCache, most_bytes: int, kernels: Kernels | None) -> None:
        """`most_bytes`: once this many are kept, later passes hand nothing over."""
        self._cache = cache
        self._most_bytes = most_bytes
        self._kernels = kernels
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile what is computed is kept."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    @property
    def _wanted(self) -> bool:
        return self._listening and self._cache.activations.nbytes < self._most_bytes

    def begin(self) -> PassActivations | None:
        """Where a pass puts its activations; None: they are not wanted."""
        return PassActivations() if self._wanted else None

    def end(self, made: PassActivations | None, nodes: Sequence[Node]) -> None:
        """`nodes` went through a pass; `made` is what it put where `begin` said."""
        if made is None:
            return
        store = self._cache.activations
        for row, node in enumerate(nodes):
            node.kept = len(store.passes), row
        store.passes.append(made)
        store.nbytes += made.nbytes

    def take_logits(self, logits: Tensor, nodes: Sequence[Node]) -> None:
        """Logits (n, vocabulary) of nodes, which nobody writes over; they are kept if they are wanted."""
        if not self._wanted:
            return
        store = self._cache.activations
        for row, node in enumerate(nodes):
            if node.kept is not None:
                store.logits_of[node.kept] = len(store.logits), row
        store.logits.append(logits)
        store.nbytes += logits.nbytes

    def recall(self, forest: Forest, versions: Sequence[AdapterVersion]) -> Recalled | None:
        """Activations of all tokens of `forest`, whose segments are of `versions`; None: some are missing."""
        if not self._cache.activations.passes:
            return None
        parents = forest.parents.tolist()
        nodes: list[Node] = []
        which, rows = np.empty(forest.size, np.int64), np.empty(forest.size, np.int64)
        for version, (_, start, end) in zip(versions, forest.segments, strict=True):
            root = self._cache.root(version)
            if root is None:
                return None
            for place, token in enumerate(forest.token_ids[start:end].tolist(), start):
                parent = nodes[parents[place]] if parents[place] >= 0 else root
                node = parent.children.get(token)
                if node is None or node.kept is None:
                    return None
                nodes.append(node)
                which[place], rows[place] = node.kept
        return Recalled(self._cache.activations, which, rows, self._kernels)
