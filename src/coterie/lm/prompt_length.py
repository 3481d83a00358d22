"""How many tokens a question takes of a base model's context, without loading the model.

    length = PromptLength.of("smollm2-135m-instruct")
    length.tokens(observation, choices, max_tokens), length.context

Only the tokenizer's own file is read: no torch, no weights, no template. What the chat template adds is counted as
`TEMPLATE` tokens, more than those of the supported families need.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.errors import BaseModelError
from coterie.types import Observation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE = 48
"""Tokens around the messages of a prompt, a default system message included."""


@dataclass(frozen=True, slots=True)
class PromptLength:
    """Counts with one base model's tokenizer."""

    tokenizer: Tokenizer
    context: int
    """Tokens the base takes at most."""

    @classmethod
    def of(cls, base: str) -> PromptLength:
        """Of a base model that is on this machine; nothing is downloaded.

        Raises:
            BaseModelError: it is not here, or its files cannot be read.
        """
        from tokenizers import Tokenizer

        from coterie.lm.embedded import resolve_base

        directory = resolve_base(base, allow_download=False)
        try:
            settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            return cls(Tokenizer.from_file(str(directory / "tokenizer.json")), _context(settings, directory))
        except Exception as error:
            # the tokenizer's reader raises nothing narrower
            raise BaseModelError(f"{directory} has no tokenizer.json or config.json to read: {error}") from error

    def tokens(self, observation: Observation, choices: Sequence[str] | None, max_tokens: int) -> int:
        """Of the prompt and of the longest answer."""
        prompt = sum(self._count(text) for text in (observation.system, observation.user, observation.prefix))
        answer = max_tokens if choices is None else max(self._count(f" {choice}") for choice in choices)
        return TEMPLATE + prompt + answer

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _context(settings: object, directory: Path) -> int:
    context = settings.get("max_position_embeddings") if isinstance(settings, dict) else None
    if not isinstance(context, int):
        raise BaseModelError(f"{directory / 'config.json'} names no max_position_embeddings")
    return context
