"""One request of the in-process engine on its way from its prompt to its last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from coterie.inference.local.cache import Node
from coterie.inference.local.choices import TrieNode
from coterie.inference.local.sampler import Distribution
from coterie.types import GenerateRequest, Generation, Tier

Reason = Literal["stop", "length", "choice"]


class Run:
    """A request, the node it waits at, and what it was answered so far."""

    __slots__ = (
        "allowed",
        "born",
        "distribution",
        "entropy",
        "future",
        "logprobs",
        "node",
        "request",
        "tokens",
        "trie",
    )

    def __init__(self, request: GenerateRequest, node: Node, trie: TrieNode | None) -> None:
        """`trie`: of the choices still open; None: text is free."""
        self.request = request
        self.node = node
        self.trie = trie
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.entropy: list[float] = []
        self.allowed: list[tuple[int, ...]] = []
        self.distribution: Distribution | None = None
        """Of the choice made last."""
        self.born = time.perf_counter()
        self.future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()

    def advance(self, token: int, logprob: float, entropy: float, allowed: tuple[int, ...] | None) -> None:
        """`token` was sampled, among those `allowed` (None: all)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.entropy.append(entropy)
        if allowed is not None and self.trie is not None:
            self.allowed.append(allowed)
            self.trie = self.trie.children[token]
            if self.trie.final:
                return
        self.node = self.node.answer(token)

    def skip_forced(self) -> None:
        """Walk through tokens that have no alternative; they need no logits."""
        while self.trie is not None and len(self.trie.allowed) == 1:
            self.advance(self.trie.allowed[0], 0.0, 0.0, self.trie.allowed)

    def reason(self, stop_ids: Sequence[int]) -> Reason | None:
        """Why it is finished; None: it is not. `stop_ids`: for requests that name none."""
        if self.trie is not None:
            return "choice" if self.trie.final else None
        if self.tokens and self.tokens[-1] in (self.request.stop_ids or stop_ids):
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_tokens else None

    def generation(self, tier: Tier, reason: Reason) -> Generation:
        return Generation(
            prompt_ids=self.request.prompt_ids,
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            allowed=tuple(self.allowed) if self.trie is not None else None,
            entropy=tuple(self.entropy),
            adapter=self.request.adapter,
            tier=tier,
            finish_reason=reason,
            choice=self.trie.choice if self.trie is not None else None,
            latency_s=time.perf_counter() - self.born,
        )
