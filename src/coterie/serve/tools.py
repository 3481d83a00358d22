"""Tool calls in Hermes' form, which most small instruct models were trained on and vLLM's parser `hermes` reads.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

One form for every `tool_choice`: what the model says here is what the template shows it of its own past calls.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"

_TOLD = (
    "You may call one or more functions to assist with the user query.\n"
    "The functions are given as JSON within <tools></tools>:\n<tools>\n{tools}\n</tools>\n"
    "For each call return a JSON object with the function's name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": <function name>, "arguments": <arguments as a JSON object>}}\n</tool_call>'
)


def call_id() -> str:
    """A fresh id of a tool call."""
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call."""

    name: str
    arguments: str
    """JSON."""
    call_id: str = field(default_factory=call_id)

    def shown(self, index: int | None = None) -> dict[str, Any]:
        """As a reply has it; with `index`, as a stream has it."""
        body: dict[str, Any] = {
            "id": self.call_id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return body if index is None else {"index": index, **body}


class CallReader:
    """Splits a growing answer into plain text and whole tool calls.

    Text after the first call is white space between calls, or chatter that OpenAI's format has no place for; it is
    dropped, as vLLM does. A call that is cut off, or no JSON, is text.
    """

    def __init__(self, *, most: int | None = None) -> None:
        """`most`: calls after this many are dropped; None: all count."""
        self._held = ""
        self._most = most
        self.calls: list[ToolCall] = []

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text and calls that became certain."""
        self._held += text
        said = ""
        made: list[ToolCall] = []
        while True:
            begin = self._held.find(BEGIN)
            if begin < 0:
                kept = next((k for k in range(len(BEGIN) - 1, 0, -1) if self._held.endswith(BEGIN[:k])), 0)
                cut = len(self._held) - kept
                said += self._plain(self._held[:cut])
                self._held = self._held[cut:]
                return said, made
            end = self._held.find(END, begin)
            if end < 0:
                said += self._plain(self._held[:begin])
                self._held = self._held[begin:]
                return said, made
            said += self._plain(self._held[:begin])
            whole, self._held = self._held[begin : end + len(END)], self._held[end + len(END) :]
            call = _read(whole[len(BEGIN) : -len(END)])
            if call is None:
                said += whole
            elif self._most is None or len(self.calls) < self._most:
                self.calls.append(call)
                made.append(call)

    def finish(self) -> str:
        """Text that never became a call."""
        rest, self._held = self._held, ""
        return rest if BEGIN in rest else self._plain(rest)

    def _plain(self, text: str) -> str:
        return "" if self.calls else text


def _read(text: str) -> ToolCall | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    arguments = data.get("arguments", data.get("parameters", {}))
    return ToolCall(data["name"], json.dumps(arguments, ensure_ascii=False))


def call_grammar(
    tools: Sequence[tuple[str, Mapping[str, Any] | None]], *, required: bool, parallel: bool, options: Mapping[str, Any]
) -> str:
    """A grammar of llguidance for an answer with calls.

    Args:
        tools: (name, JSON schema of the arguments) of each tool that may be called.
        required: the answer is calls and nothing else; otherwise it is text in which whatever begins a call is one.
        parallel: more than one call.
        options: of llguidance's JSON compiler, for the arguments.
    """
    bodies = []
    for name, schema in tools:
        # arguments a tool did not declare would be errors where it is called
        closed = {"type": "object", "properties": {}, "additionalProperties": False}
        known = {**closed, **(schema or {}), "x-guidance": dict(options)}
        opening = f'\n{{"name": {json.dumps(name)}, "arguments": '
        bodies.append(f"{_quoted(opening)} %json {json.dumps(known)} {_quoted('}' + chr(10) + END)}")
    rules = [f"body_{number}: {body}" for number, body in enumerate(bodies)]
    body = " | ".join(f"body_{number}" for number in range(len(bodies)))
    if required:
        more = f" ({_quoted(chr(10))} call){{0,15}}" if parallel else ""
        head = [f"start: call{more}", f"call: {_quoted(BEGIN)} ({body})"]
    else:
        calls = "call*" if parallel else "call?"
        head = [
            f"start: {calls} rest",
            "rest: TEXT",
            "TEXT: /(.|\\n)*/",
            f"trigger[lazy]: TEXT {_quoted(BEGIN)}",
            f"call: trigger ({body})",
        ]
    return "\n".join(["%llguidance {}", *head, *rules]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)


def told_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """A chat with tools, for a template that knows only roles and texts: tools in the system message, calls and their
    results as text."""
    told = [_told(message) for message in messages]
    if tools:
        words = _TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if told and told[0]["role"] == "system":
            told[0] = {**told[0], "content": f"{told[0]['content']}\n\n{words}"}
        else:
            told.insert(0, {"role": "system", "content": words})
    return told


def _told(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls") or ()
    lines: list[str] = [content] if content else []
    for call in calls:
        function: Mapping[str, Any] = call.get("function") or {}
        arguments = function.get("arguments")
        shown = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        lines.append(f'{BEGIN}\n{{"name": {json.dumps(function.get("name"))}, "arguments": {shown or "{}"}}}\n{END}')
    return {**message, "content": "\n".join(lines)}
