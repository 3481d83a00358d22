"""Answers made up when nothing can generate: the system goes on, says so, and learns nothing from them.

Every text begins with `LABEL`, every generation carries `Tier.SIMULATED`, and `types.Turn.trainable` is False for
that tier whoever asks. Choices are uniform over the choices and free text is drawn from a fixed list, both by the
request's seed alone.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path

from coterie.inference.base import check_request
from coterie.inference.local.choices import TrieNode, build_trie
from coterie.inference.sampling import uniform
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier

LABEL = "[simulated]"
"""How every simulated text begins."""

_SENTENCES = (
    "协同合作 (cooperation): share what is known and divide the work.",
    "竞争优化 (competition, optimisation): compare the options and take the best.",
    "先分析任务，再逐步完成 (analyse the task, then go step by step).",
    "检查结果后再回答 (check the result before answering).",
)
_SEED_BITS = (1 << 63) - 1


def simulated_text(seed: int) -> str:
    """A sentence that says at its beginning that it is simulated."""
    return f"{LABEL} {random.Random(seed & _SEED_BITS).choice(_SENTENCES)}"


class SimulatedEngine:
    """The last tier. Takes every request and knows every adapter, because none changes its answers."""

    tier = Tier.SIMULATED

    def __init__(self, encode: Callable[[str], tuple[int, ...]] | None = None) -> None:
        """`encode`: text to token ids, so that free text reads as what it is; without it free text is drawn uniformly
        from the prompt's own token ids."""
        self._encode = encode
        self.requests_served = 0

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`. Log-probabilities are those of the draw that was made, of no model.

        Raises:
            RequestError: an empty prompt, max_tokens below 1, or `distribution` without choices.
        """
        check_request(request)
        await asyncio.sleep(0)  # whoever asks in a loop lets others go on too, and can be cancelled
        self.requests_served += 1
        if request.choices is None:
            return self._free(request)
        stop = request.stop_ids[0] if request.stop_ids else None
        root = build_trie(request.choices, stop)
        if request.distribution:
            share = 1.0 / len(request.choices)
            return _made(request, finish_reason="choice", choice_probs=(share,) * len(request.choices))
        return _choice(request, root)

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """Does nothing: no adapter changes a simulated answer."""

    async def close(self) -> None: ...

    def _free(self, request: GenerateRequest) -> Generation:
        stop = request.stop_ids[:1]
        if self._encode is not None:
            said = self._encode(simulated_text(request.seed)) + stop
            each = 0.0  # the text is fixed by the seed
        else:
            rng = random.Random(request.seed & _SEED_BITS)
            candidates = sorted(set(request.prompt_ids) - set(request.stop_ids))
            said = tuple(rng.choices(candidates, k=rng.randint(1, request.max_tokens))) if candidates else ()
            said += stop
            each = -math.log(max(1, len(candidates)))
        tokens = said[: request.max_tokens]
        ended = bool(stop) and len(said) <= request.max_tokens
        logprobs = [each] * len(tokens)
        if ended:
            logprobs[-1] = 0.0
        return _made(
            request,
            finish_reason="stop" if ended else "length",
            token_ids=tokens,
            logprobs=tuple(logprobs),
            entropy=tuple(-p for p in logprobs),
        )


def _choice(request: GenerateRequest, node: TrieNode) -> Generation:
    """Walk down the trie by the number of choices below each token, which makes the choices equally likely."""
    tokens: list[int] = []
    logprobs: list[float] = []
    entropy: list[float] = []
    allowed: list[tuple[int, ...]] = []
    while not node.final:
        shares = [node.children[token].leaves / node.leaves for token in node.allowed]
        u = uniform(request.seed, len(tokens)) if len(shares) > 1 else 0.0
        index, below = 0, shares[0]
        while u >= below and index < len(shares) - 1:
            index += 1
            below += shares[index]
        tokens.append(node.allowed[index])
        logprobs.append(math.log(shares[index]))
        entropy.append(-sum(share * math.log(share) for share in shares))
        allowed.append(node.allowed)
        node = node.children[node.allowed[index]]
    return _made(
        request,
        finish_reason="choice",
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        entropy=tuple(entropy),
        allowed=tuple(allowed),
        choice=node.choice,
    )


def _made(
    request: GenerateRequest,
    *,
    finish_reason: str,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[float, ...] = (),
    entropy: tuple[float, ...] = (),
    allowed: tuple[tuple[int, ...], ...] | None = None,
    choice: int | None = None,
    choice_probs: tuple[float, ...] | None = None,
) -> Generation:
    if choice_probs is not None:
        allowed = ()
    return Generation(
        prompt_ids=request.prompt_ids, token_ids=token_ids, logprobs=logprobs, allowed=allowed, entropy=entropy,
        adapter=request.adapter, tier=Tier.SIMULATED, finish_reason=finish_reason,  # type: ignore[arg-type]
        choice=choice, choice_probs=choice_probs,
    )  # fmt: skip
