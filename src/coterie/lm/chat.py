"""Observations to prompt ids and back, under the base model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from unicodedata import east_asian_width

from coterie.errors import BaseModelError
from coterie.lm.template import ChatTemplate
from coterie.types import Observation


class TokenizerChat:
    """The chat format of one tokenizer. Rendering is cached: identical observations give the identical tuple."""

    def __init__(self, tokenizer: Any, cache_size: int = 65536) -> None:
        """`tokenizer`: a fast tokenizer of transformers with a chat template."""
        if not tokenizer.chat_template:
            raise BaseModelError(
                "the base model's tokenizer has no chat template; use an instruct model, or add chat_template.jinja"
            )
        self.tokenizer = tokenizer
        named = tokenizer.chat_template
        # transformers' own way to the same text takes three times as long
        self._template = ChatTemplate(
            named["default"] if isinstance(named, dict) else named,
            {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        )
        # asked directly: transformers hands a single text to a pool of threads, which costs more than the work
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>"))}
        unknown = tokenizer.unk_token_id
        self.stop_ids = tuple(sorted(i for i in ends if i is not None and i != unknown))
        self._special = tuple(sorted(tokenizer.all_special_tokens, key=len, reverse=True))
        self.render = lru_cache(maxsize=cache_size)(self._render)
        self._encode = lru_cache(maxsize=cache_size)(self._encode_text)
        self._encode_choices = lru_cache(maxsize=cache_size)(self._encode_texts)

    def _render(self, observation: Observation) -> tuple[int, ...]:
        messages = [{"role": "system", "content": self._plain(observation.system)}] if observation.system else []
        messages.append({"role": "user", "content": self._plain(observation.user)})
        return self._encode(self._template.render(messages, answer=True) + self._plain(observation.prefix))

    def _plain(self, text: str) -> str:
        # advice and task files are untrusted: a special token in them must not open or close a message
        for token in self._special:
            while token in text:
                text = text.replace(token, "")
        return text

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_choices(self, observation: Observation, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of each choice, as it is written after the prefix: with a space between, unless the prefix ends in white
        space or in a full-width character ("答案："), which Chinese and Japanese continue directly."""
        last = observation.prefix[-1:]
        space = " " if last and not last.isspace() and east_asian_width(last) not in ("W", "F") else ""
        return self._encode_choices(space, tuple(choices))

    def _encode_texts(self, before: str, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(self._encode(before + text) for text in texts)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()
