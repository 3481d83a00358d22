"""Text to token ids and back: rendering chats, decoding one token, decoding a growing answer and finding its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from coterie.serve.errors import rejected
from coterie.serve.tools import told_in_words

_HALF = "\ufffd"
"""What a tokenizer gives for bytes that are not yet a character."""


class Text:
    """One tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a fast tokenizer of transformers with a chat template."""
        self.tokenizer = tokenizer
        self._knows_tools = "tools" in str(tokenizer.chat_template)
        self.token = lru_cache(maxsize=65536)(self._token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat under the model's own template.

        A template that does not know tools gets them as words of the system message (see `tools.told_in_words`).

        Raises:
            ApiError: 400 where a message is malformed or the template refuses it.
        """
        plain = [_plain(message, index) for index, message in enumerate(messages)]
        if self._knows_tools:
            plain = [_with_read_calls(message) for message in plain]
        else:
            plain, tools = told_in_words(plain, tools), None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain,
                    tools=list(tools) if tools else None,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(arguments or {}),
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise rejected(f"the chat template cannot render these messages: {error}", "messages") from error

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Ids of a text; `special`: with what the tokenizer puts around every text (a BOS token, say)."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def _token(self, token_id: int) -> str:
        """One token alone."""
        return str(self.tokenizer.decode([token_id]))


class Unfolding:
    """The text of a growing answer.

    `add` returns the text that is certain: whole characters, and nothing that may turn out to begin a stop string.
    """

    def __init__(
        self,
        text: Text,
        prompt_ids: Sequence[int] = (),
        *,
        stops: Sequence[str],
        include_stop: bool,
        skip_special: bool,
    ) -> None:
        self._text = text
        self._stops, self._include, self._skip = tuple(stops), include_stop, skip_special
        # ids [_from:_read] have been decoded; those after them are decoded together with them, because what a token
        # looks like depends on those before it (a space at the beginning, say)
        self._ids = list(prompt_ids[-4:])
        self._from, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that was found."""

    def add(self, token_id: int, *, look: bool = True) -> str:
        """Text that became certain with this token. `look`: whether a stop string counts yet."""
        self._ids.append(token_id)
        before = self._text.decode(self._ids[self._from : self._read], skip_special=self._skip)
        now = self._text.decode(self._ids[self._from :], skip_special=self._skip)
        if len(now) <= len(before) or now.endswith(_HALF):
            return ""
        self._from, self._read = self._read, len(self._ids)
        self._held += now[len(before) :]
        return self._release(look)

    def finish(self) -> str:
        """The rest: characters that never became whole, and what was held back for a stop string that did not come."""
        if self.stopped_by is not None:
            return ""
        before = self._text.decode(self._ids[self._from : self._read], skip_special=self._skip)
        now = self._text.decode(self._ids[self._from :], skip_special=self._skip)
        rest, self._held = self._held + now[len(before) :], ""
        self._from = self._read = len(self._ids)
        return rest

    def _release(self, look: bool) -> str:
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0] if look else []
        if found:
            at, self.stopped_by = min(found)
            certain, self._held = self._held[: at + len(self.stopped_by) * self._include], ""
            return certain
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is one text."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise rejected(f"messages.{index} has no role", f"messages.{index}.role")
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise rejected(
                    f"messages.{index} holds a part of type {kind!r}; this model reads text only", "messages"
                )
        content = "\n".join(parts)
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise rejected(f"messages.{index}.content must be a text or a list of parts", f"messages.{index}.content")
    return {**message, "content": content}


def _with_read_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as data: templates write them as JSON themselves."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise rejected(f"arguments of the tool call {function.get('name')!r} are no JSON: {error}") from error
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message
