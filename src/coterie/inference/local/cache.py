"""The key/value cache: a preallocated pool of slots, and the tree of tokens that hold them.

Each node is one token after one exact prefix under one adapter version; whoever asks for the same prefix gets the
same node, so a prompt asked by a thousand episodes is computed once. A node without a slot has not been computed (or
its slot was given to somebody else) and is computed again when needed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.lm.activations import Place, Store
from coterie.types import AdapterVersion


class Node:
    """One cached token."""

    __slots__ = ("children", "depth", "hidden", "kept", "memo", "parent", "places", "slot", "token", "trunk")

    def __init__(self, token: int, parent: Node | None, depth: int) -> None:
        self.token = token
        self.parent = parent
        self.depth = depth
        self.slot = -1
        self.hidden: Tensor | None = None
        """Last hidden state (hidden,), once it was needed for sampling."""
        self.kept: Place | None = None
        """The pass and the row where its activations are, if they were kept; see `Kept`."""
        self.memo: dict[object, object] = {}
        """Sampling distributions already made at this node."""
        self.children: dict[int, Node] = {}
        self.trunk: Node | None = None
        """The last token of the prompt this node answers: what its siblings share and attend to together."""
        self.places: list[int] | None = None
        """Slots of the whole path, remembered where they were asked for."""

    def slots(self) -> list[int]:
        """Slots from the first token of the prompt to this one; all must be computed or being computed."""
        if self.places is None:
            missing = []
            node: Node | None = self
            while node is not None and node.depth >= 0 and node.places is None:
                missing.append(node.slot)
                node = node.parent
            missing.reverse()
            self.places = [*node.places, *missing] if node is not None and node.places is not None else missing
        return self.places

    def path(self) -> list[Node]:
        """Nodes from the first token of the prompt to this one."""
        nodes = []
        node: Node | None = self
        while node is not None and node.depth >= 0:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def child(self, token: int) -> Node:
        node = self.children.get(token)
        if node is None:
            node = self.children[token] = Node(token, self, self.depth + 1)
        return node

    def answer(self, token: int) -> Node:
        """The child that continues an answer: it shares this node's trunk, or begins after the prompt's end here."""
        node = self.child(token)
        if node.trunk is None:
            node.trunk = self.trunk or self
        return node


class PrefixCache:
    """Slots and the tree over them."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self.keys = [torch.zeros(kv_heads, slots, head_dim, dtype=dtype, device=device) for _ in range(layers)]
        """One pool per layer, (kv_heads, slots, head_dim): a run of slots is a matrix per head, ready to multiply."""
        self.values = [torch.zeros_like(k) for k in self.keys]
        self._roots: dict[AdapterVersion | None, Node] = {}
        self._prompts: dict[tuple[AdapterVersion | None, tuple[int, ...]], Node] = {}
        self._free = list(range(slots - 1, -1, -1))
        self.activations = Store()
        """Of passes since the cache was last empty, as far as they are kept."""

    @property
    def free(self) -> int:
        return len(self._free)

    def node(self, adapter: AdapterVersion | None, tokens: tuple[int, ...]) -> Node:
        """The node of the last of `tokens`; missing nodes are made, not computed."""
        key = (adapter, tokens)
        node = self._prompts.get(key)
        if node is None:
            node = self._roots.setdefault(adapter, Node(-1, None, -1))
            for token in tokens:
                node = node.child(token)
            self._prompts[key] = node
        return node

    def root(self, adapter: AdapterVersion | None) -> Node | None:
        """Before the first token under a version; None: nothing was asked of it."""
        return self._roots.get(adapter)

    def take(self, nodes: Iterable[Node]) -> list[int]:
        """Give each node a slot. The caller has made sure there are enough."""
        slots = []
        for node in nodes:
            node.slot = self._free.pop()
            slots.append(node.slot)
        return slots

    def keep_only(self, needed: Iterable[Node], referenced: Iterable[Node]) -> None:
        """Free the slots of every node that is not on the path of a needed one.

        Nodes on the path of a referenced one stay in the tree without a slot, to be computed again when their turn
        comes; all others are forgotten.
        """
        kept, known = _on_paths(needed), _on_paths(referenced)
        self._prompts.clear()
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            for token, child in list(node.children.items()):
                stack.append(child)
                if id(child) in kept:
                    continue
                if child.slot >= 0:
                    self._free.append(child.slot)
                    child.slot = -1
                child.hidden = child.places = None
                child.memo.clear()
                if id(child) not in known:
                    del node.children[token]

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self.activations.clear()
        self._prompts.clear()
        self._free = list(range(self.slots - 1, -1, -1))


def _on_paths(nodes: Iterable[Node]) -> set[int]:
    found: set[int] = set()
    for node in nodes:
        step: Node | None = node
        while step is not None and id(step) not in found:
            found.add(id(step))
            step = step.parent
    return found
