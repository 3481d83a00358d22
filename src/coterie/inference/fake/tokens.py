"""How the fake turns text into ids and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]


class FakeTokenizer(Protocol):
    """What the fake needs of a tokenizer."""

    vocabulary: int
    """Ids are below this."""
    stop_ids: tuple[int, ...]
    """A generation ends after one of these, as after a model's own end token."""

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        ...

    def chat(self, messages: Sequence[Message], continued: bool) -> Sequence[int]:
        """Prompt ids of a chat. `continued`: the last message is left open; otherwise the assistant's is opened."""
        ...

    def __hash__(self) -> int: ...


class ByteTokenizer:
    """Bytes as ids, after three special tokens; chats as in ChatML."""

    END_OF_TEXT, START, END = 0, 1, 2
    vocabulary = 259
    stop_ids: tuple[int, ...] = (END,)

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", "replace")

    def chat(self, messages: Sequence[Message], continued: bool) -> list[int]:
        ids: list[int] = []
        for place, message in enumerate(messages):
            ids += [self.START, *self.encode(f"{message.get('role')}\n{text_of(message)}")]
            if not (continued and place == len(messages) - 1):
                ids += [self.END, *self.encode("\n")]
        return ids if continued else [*ids, self.START, *self.encode("assistant\n")]


class HubTokenizer:
    """A tokenizer of transformers, so that the fake reads the ids of a real model."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] | None = None) -> None:
        """`tokenizer`: a `PreTrainedTokenizerFast` with a chat template. `stop_ids`: None: its end token."""
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.stop_ids = (tokenizer.eos_token_id,) if stop_ids is None else tuple(stop_ids)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Message], continued: bool) -> list[int]:
        plain = [{**message, "content": text_of(message)} for message in messages]
        text = self._tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
        return self.encode(text)


def text_of(message: Message) -> str:
    """The text of a chat message: its content, its parts, or the tool calls it made."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return content
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    calls = message.get("tool_calls") or ()
    return "\n".join(tool_text(call["function"]["name"], call["function"]["arguments"]) for call in calls)


def tool_text(name: str, arguments: str | Mapping[str, Any]) -> str:
    """A tool call as Hermes models write it."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
