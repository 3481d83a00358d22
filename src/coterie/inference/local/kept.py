"""What rollout computed, for the learner that puts the same tokens through the same weights next.

    listening()  meanwhile passes hand their activations over, by reference, up to so many bytes
    recall()     those of a forest's tokens; what is missing is computed

Whatever empties the cache, publication above all, empties this with it: nothing is kept of older weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from coterie.inference.local.cache import Node, PrefixCache
from coterie.inference.local.scheduler import Pass
from coterie.lm.activations import PassActivations, Recalled
from coterie.lm.forest import Forest
from coterie.lm.native.kernels import Kernels
from coterie.types import AdapterVersion


class Kept:
    """Activations of the passes that filled a cache."""

    def __init__(
        self,
        cache: PrefixCache,
        most_bytes: int,
        kernels: Kernels | None,
        compute: Callable[[Pass], PassActivations | None],
    ) -> None:
        """
        Args:
            most_bytes: once this many are kept, later passes hand nothing over.
            compute: a pass over nodes whose parents are in the cache or come before them; None: there is no room.
        """
        self._cache = cache
        self._most_bytes = most_bytes
        self._kernels = kernels
        self._compute = compute
        self._listening = False
        self._thread = -1
        """That of the engine."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile what is computed is kept."""
        self._listening, self._thread = True, threading.get_ident()
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
        """Activations of all tokens of `forest`, whose segments are of `versions`.

        Those that are missing are computed, with the keys and values of the others. None: nothing is known of a
        version, there is no room to compute what is missing, or an engine may be at work in another thread.
        """
        store = self._cache.activations
        if not store.passes:
            return None
        alone = threading.get_ident() == self._thread
        parents = forest.parents.tolist()
        nodes: list[Node] = []
        for version, (_, start, end) in zip(versions, forest.segments, strict=True):
            root = self._cache.root(version)
            if root is None:
                return None
            for place, token in enumerate(forest.token_ids[start:end].tolist(), start):
                parent = nodes[parents[place]] if parents[place] >= 0 else root
                node = parent.child(token) if alone else parent.children.get(token)
                if node is None:
                    return None
                nodes.append(node)
        # what lost its keys and values is computed too: others may need them
        missing = [place for place, node in enumerate(nodes) if node.kept is None or node.slot < 0]
        passes = list(store.passes)
        if missing:
            segments, at = [], 0
            for version, (_, start, end) in zip(versions, forest.segments, strict=True):
                count = sum(start <= place < end for place in missing)
                segments.append((version, at, at + count))
                at += count
            work = Pass(tuple(nodes[place] for place in missing), tuple(segments), (), 0)
            made = self._compute(work) if alone else None
            if made is None:
                return None
            passes.append(made)
        which, rows = (np.array(column) for column in zip(*(node.kept or (-1, -1) for node in nodes), strict=True))
        which[missing], rows[missing] = len(store.passes), np.arange(len(missing))
        return Recalled(passes, store, which, rows, self._kernels, computed=len(missing))
