"""An engine and a chat format small enough to check by hand, for tests of what surrounds an engine.

    chat = Words()                                                  # a token is a word
    engine = LogitEngine(lambda prefix, token: 1.0 if token == chat.id("yes") else 0.0)

The engine samples from softmax(logit(prefix, token) + bias) along the token trie of the choices; free text is the
tokens `text` gives. Every request is kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coterie.errors import EngineError
from coterie.inference.local.choices import TrieNode, build_trie
from coterie.modes.base import Mode, build_mode
from coterie.rollout.calibration import Calibration
from coterie.rollout.table import TableServices
from coterie.types import AdapterVersion, GenerateRequest, Generation, Observation, Tier, TrainingMode

Logit = Callable[[tuple[int, ...], int], float]
"""(tokens so far, candidate) -> its logit."""


def flat(prefix: tuple[int, ...], token: int) -> float:
    return 0.0


class Words:
    """A token is a word; id 0 ends a turn."""

    stop_ids = (0,)

    def __init__(self) -> None:
        self._words = ["<end>"]

    def id(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def render(self, observation: Observation) -> tuple[int, ...]:
        return tuple(map(self.id, f"{observation.system} {observation.user} {observation.prefix}".split()))

    def encode_choices(self, observation: Observation, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(self.id, choice.split())) for choice in choices)

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self._words[token] for token in token_ids if token)


class LogitEngine:
    """Samples exactly from a function of logits."""

    tier = Tier.LOCAL

    def __init__(self, logit: Logit = flat, text: Sequence[int] = (0,)) -> None:
        self.logit, self.text = logit, tuple(text)
        self.requests: list[GenerateRequest] = []
        self.published: list[AdapterVersion] = []
        self.broken = False

    async def generate(self, request: GenerateRequest) -> Generation:
        if self.broken:
            raise EngineError("the engine is broken")
        self.requests.append(request)
        if request.choices is None:
            tokens = self.text[: request.max_tokens]
            ended = bool(tokens) and tokens[-1] in request.stop_ids
            return self._made(request, tokens, [-1.0] * len(tokens), None, "stop" if ended else "length")
        if request.distribution:
            return self._made(request, (), [], None, "choice", probs=self._all(request))
        rng, node = random.Random(request.seed), build_trie(request.choices, self._stop(request))
        path: tuple[int, ...] = ()
        logprobs: list[float] = []
        allowed: list[tuple[int, ...]] = []
        while not node.final:
            probs = self._probs(request, node, path)
            greedy = request.temperature == 0
            token = max(probs, key=probs.__getitem__) if greedy else rng.choices([*probs], [*probs.values()])[0]
            path, node = (*path, token), node.children[token]
            logprobs.append(math.log(probs[token]))
            allowed.append(tuple(probs))
        return self._made(request, path, logprobs, tuple(allowed), "choice", choice=node.choice)

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        self.published.append(version)

    async def close(self) -> None: ...

    def _stop(self, request: GenerateRequest) -> int | None:
        return request.stop_ids[0] if request.stop_ids else None

    def _probs(self, request: GenerateRequest, node: TrieNode, path: tuple[int, ...]) -> dict[int, float]:
        bias: Mapping[int, float] = request.bias or {}
        prefix, t = request.prompt_ids + path, request.temperature or 1.0
        weights = {token: math.exp((self.logit(prefix, token) + bias.get(token, 0.0)) / t) for token in node.allowed}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    def _all(self, request: GenerateRequest) -> tuple[float, ...]:
        assert request.choices is not None
        found = [0.0] * len(request.choices)

        def walk(node: TrieNode, path: tuple[int, ...], mass: float) -> None:
            if node.final:
                assert node.choice is not None
                found[node.choice] = mass
                return
            for token, p in self._probs(request, node, path).items():
                walk(node.children[token], (*path, token), mass * p)

        walk(build_trie(request.choices, self._stop(request)), (), 1.0)
        return tuple(found)

    def _made(
        self,
        request: GenerateRequest,
        tokens: tuple[int, ...],
        logprobs: Sequence[float],
        allowed: tuple[tuple[int, ...], ...] | None,
        reason: str,
        choice: int | None = None,
        probs: tuple[float, ...] | None = None,
    ) -> Generation:
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=tokens, logprobs=tuple(logprobs), allowed=allowed,
            entropy=(0.5,) * len(tokens), adapter=request.adapter, tier=self.tier,
            finish_reason=reason, choice=choice, choice_probs=probs, server="nearby", latency_s=0.25,  # type: ignore[arg-type]
        )  # fmt: skip


def make_services(
    engine: LogitEngine | None = None,
    chat: Words | None = None,
    mode: TrainingMode | str = "cooperative",
    **fields: object,
) -> TableServices:
    """Services of a run on a `LogitEngine`; any field of `TableServices` may be given."""
    rules: Mode = build_mode(TrainingMode(mode))
    defaults = {
        "engine": engine or LogitEngine(),
        "chat": chat or Words(),
        "mode": rules,
        "scripts": {},
        "calibration": Calibration(),
        "temperature": 1.0,
        "language": "en",
        "seed": 0,
    }
    return TableServices(**{**defaults, **fields})  # type: ignore[arg-type]
