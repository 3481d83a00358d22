"""Answers with a fixed set of choices: the token trie that decoding walks.

At a node only the tokens that continue some choice are allowed, so every answer is one of the choices and its
probability is that of the constrained policy. Where one choice is the beginning of another, the shorter one ends
with the stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from coterie.errors import RequestError


@dataclass(slots=True)
class TrieNode:
    """A point in the trie. `allowed` is sorted, so that equal sets are equal tuples."""

    allowed: tuple[int, ...] = ()
    children: dict[int, TrieNode] = field(default_factory=dict)
    choice: int | None = None
    """Index of the choice that is complete here."""
    leaves: int = 0
    """Choices at or below this node."""

    @property
    def final(self) -> bool:
        return not self.children


@lru_cache(maxsize=65536)
def build_trie(choices: tuple[tuple[int, ...], ...], stop_id: int | None) -> TrieNode:
    """The trie of token sequences `choices`.

    Raises:
        RequestError: no choices, an empty one, two equal ones, or one that begins another without a stop token.
    """
    if not choices:
        raise RequestError("choices is empty; give at least one, or None for free text")
    root = TrieNode()
    for index, tokens in enumerate(choices):
        if not tokens:
            raise RequestError(f"choice {index} has no tokens")
        node = root
        for token in tokens:
            node = node.children.setdefault(token, TrieNode())
        if node.choice is not None:
            raise RequestError(f"choices {node.choice} and {index} are the same tokens; make them differ")
        node.choice = index
    _finish(root, stop_id)
    return root


def _finish(node: TrieNode, stop_id: int | None) -> int:
    if node.choice is not None and node.children:
        if stop_id is None:
            raise RequestError(
                f"choice {node.choice} begins another choice, and there is no stop token to tell them apart"
            )
        node.children[stop_id] = TrieNode(choice=node.choice)
        node.choice = None
    node.allowed = tuple(sorted(node.children))
    node.leaves = sum(_finish(child, stop_id) for child in node.children.values()) if node.children else 1
    return node.leaves


def branching_paths(root: TrieNode) -> Sequence[tuple[tuple[int, ...], TrieNode]]:
    """Every (tokens so far, node) at which more than one token is allowed, root first."""
    found: list[tuple[tuple[int, ...], TrieNode]] = []
    stack: list[tuple[tuple[int, ...], TrieNode]] = [((), root)]
    while stack:
        path, node = stack.pop()
        if len(node.allowed) > 1:
            found.append((path, node))
        stack.extend(((*path, token), child) for token, child in node.children.items())
    return sorted(found, key=lambda item: (len(item[0]), item[0]))
