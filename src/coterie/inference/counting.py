"""How many tokens a chat takes, counted as the server that will read it does, without the server and without torch.

    messages --chat template--> text --tokenizer--> ids        count = len(ids)

Counters are used by callers that keep a conversation inside a model's context, and that add up counts of single
messages. A template that opens every chat with a system message of its own would then count it once a message; so that
opening is measured once (`overhead`) and left out of every count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from coterie.errors import BaseModelError, ConfigError
from coterie.lm.catalog import CATALOG, model_directory
from coterie.lm.template import ChatTemplate, Message, template_of, to_json


class ChatCounter(Protocol):
    """Counts tokens; the methods are those of CAMEL's `BaseTokenCounter`."""

    @property
    def overhead(self) -> int:
        """Tokens that a chat takes beside its messages: what the template opens it with, and the answer's header."""
        ...

    def count_tokens_from_messages(self, messages: Sequence[Message]) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class TokenizerCounter:
    """Counts with the tokenizer and the chat template of a model directory; nothing else of it is read."""

    def __init__(self, directory: Path) -> None:
        """`directory`: holds tokenizer.json, and the template in chat_template.jinja or tokenizer_config.json.

        Raises:
            BaseModelError: no tokenizer.json there, or it cannot be read.
        """
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BaseModelError(
                f"{directory} holds no tokenizer.json; give the directory of the served model, "
                f"or no tokenizer at all to have tokens estimated"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise BaseModelError(f"cannot read {path}: {error}") from error
        self._template = _Form(*template_of(directory))
        user: Message = {"role": "user", "content": "x"}
        system: Message = {"role": "system", "content": "x"}
        alone, opened, both = self._length([user]), self._length([system]), self._length([system, user])
        self._opening = max(0, alone - (both - opened))
        self._header = self._length([user], answer=True) - alone

    @property
    def overhead(self) -> int:
        return self._opening + self._header

    def count_tokens_from_messages(self, messages: Sequence[Message]) -> int:
        """Tokens of the messages. One that the template refuses (a role it does not know) is counted by itself."""
        if not messages:
            return 0
        count = self._length(messages)
        return count if messages[0].get("role") == "system" else max(0, count - self._opening)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _length(self, messages: Sequence[Message], answer: bool = False) -> int:
        return len(self.encode(self._template.render(messages, answer)))


class ByteCounter:
    """An estimate for a model whose tokenizer is not at hand: one token for three bytes of UTF-8, rounded up."""

    overhead = 32
    """Enough for the opening of common templates."""

    def count_tokens_from_messages(self, messages: Sequence[Message]) -> int:
        return sum(8 + -(-len(_text(message).encode()) // 3) for message in messages)

    def encode(self, text: str) -> list[int]:
        """The bytes; there are more of them than tokens."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def counter_for(tokenizer: str | Path | None) -> ChatCounter:
    """The counter of a tokenizer: an embedded model's name or a model directory; None: an estimate.

    Raises:
        ConfigError: a name that is neither.
        BaseModelError: the directory holds no usable tokenizer.
    """
    if tokenizer is None:
        return ByteCounter()
    if str(tokenizer) in CATALOG:
        return TokenizerCounter(model_directory(CATALOG[str(tokenizer)]))
    directory = Path(tokenizer).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"tokenizer {str(tokenizer)!r}: no such directory; give the directory of the served model, "
            f"one of {', '.join(CATALOG)}, or None to have tokens estimated"
        )
    return TokenizerCounter(directory)


class _Form:
    """A chat's text under the model's template; where that fails, a plain form of about equal length, because counting
    must not stop a conversation that the server itself may well accept."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._template: ChatTemplate | None = None
        with suppress(BaseModelError):
            self._template = ChatTemplate(source, special)

    def render(self, messages: Sequence[Message], answer: bool) -> str:
        if self._template is not None:
            with suppress(BaseModelError):
                return self._template.render([{**m, "content": _text(m)} for m in messages], answer)
        body = "".join(f"<|im_start|>{m.get('role', '')}\n{_text(m)}<|im_end|>\n" for m in messages)
        return body + ("<|im_start|>assistant\n" if answer else "")


def _text(message: Message) -> str:
    """A message's text: of plain content, of the parts of composed content, and of tool calls."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    calls = message.get("tool_calls")
    return (content or "") + (to_json(calls) if calls else "")
