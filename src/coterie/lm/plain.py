"""A tokenizer read by the tokenizers library alone, for where there is no transformers (and so no torch).

It has the methods of transformers' tokenizers that prompts are made with (`TokenizerChat`, engines on servers), and
gives the same ids: what it reads are the same files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import BaseModelError
from coterie.lm.template import ChatTemplate, template_of
from coterie.lm.tiny import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, tiny_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PlainTokenizer:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: Mapping[str, str]) -> None:
        """
        Args:
            template: the chat template's source.
            special: "bos_token", "eos_token", "unk_token", "pad_token", as far as there are such.

        Raises:
            BaseModelError: the template is empty or cannot be read.
        """
        self.backend_tokenizer = tokenizer
        ChatTemplate(template, special)  # refused here, before anybody asks for a prompt
        self.chat_template = template
        self.special_tokens_map = dict(special)
        self.eos_token_id = self.convert_tokens_to_ids(special.get("eos_token", ""))
        self.unk_token_id = self.convert_tokens_to_ids(special.get("unk_token", ""))
        added: Mapping[int, Any] = tokenizer.get_added_tokens_decoder()
        named = {token for token in special.values() if token}
        self.all_special_tokens: Sequence[str] = sorted({t.content for t in added.values() if t.special} | named)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """None: there is no such token."""
        found: int | None = self.backend_tokenizer.token_to_id(token) if token else None
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are theirs."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, white space kept."""
        return str(self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def read_tokenizer(directory: Path) -> PlainTokenizer:
    """The tokenizer of a model directory; weights need not be there.

    Raises:
        BaseModelError: no tokenizer.json, or it or the chat template cannot be read.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BaseModelError(f"{directory} holds no tokenizer.json; give the directory of a model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise BaseModelError(f"cannot read {path}: {error}") from error
    return PlainTokenizer(tokenizer, *template_of(directory))


def byte_tokenizer() -> PlainTokenizer:
    """Bytes and a few words as tokens, of no model: for simulated runs whose base is not on disk."""
    special = {"bos_token": TURN_START, "eos_token": TURN_END, "unk_token": END_OF_TEXT, "pad_token": TURN_END}
    return PlainTokenizer(tiny_tokenizer(), CHAT_TEMPLATE, special)
