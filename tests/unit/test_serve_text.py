"""Text of a growing answer and of a conversation: nothing lost, nothing said too early, nothing misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coterie.serve.errors import ApiError
from coterie.serve.text import Text, Unfolding
from coterie.serve.tools import CallReader, ToolCall, told_in_words

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def text(tiny_path: Path) -> Text:
    return Text(AutoTokenizer.from_pretrained(tiny_path))


def unfold(text: Text, said: str, prompt: str = "", **options: Any) -> tuple[list[str], Unfolding]:
    """What each token of `said` releases, then the rest."""
    made = Unfolding(
        text,
        text.encode(prompt, special=False),
        **{"stops": (), "include_stop": False, "skip_special": True, **options},
    )
    pieces = []
    for token in text.encode(said, special=False):
        pieces.append(made.add(token))
        if made.stopped_by is not None:
            break
    return [*pieces, made.finish()], made


@settings(max_examples=60)
@given(
    said=st.text(alphabet="aé日🙂 redblue\n", max_size=20), stops=st.lists(st.text("aé日🙂 re", min_size=1, max_size=3))
)
def test_pieces_add_up_to_the_text_before_the_first_stop(text: Text, said: str, stops: list[str]) -> None:
    pieces, made = unfold(text, said, stops=stops)
    found = [said.find(stop) for stop in stops if stop in said]
    if made.stopped_by is None:
        assert "".join(pieces) == said
        assert not found
    else:
        # the first stop to be complete ends the answer; no other is complete before
        ended = "".join(pieces)
        assert said.startswith(ended + made.stopped_by)
        assert not any(stop in ended for stop in stops)


def test_half_a_character_is_not_said(text: Text) -> None:
    pieces, _ = unfold(text, "🙂!")
    assert len(pieces) > 3
    assert [piece for piece in pieces if piece] == ["🙂", "!"]


def test_a_character_that_never_became_whole_is_told_at_the_end(text: Text) -> None:
    half = text.encode("🙂", special=False)[:2]
    made = Unfolding(text, (), stops=(), include_stop=False, skip_special=True)
    assert [made.add(token) for token in half] == ["", ""]
    assert set(made.finish()) == {"\ufffd"}
    assert made.finish() == ""


def test_what_may_begin_a_stop_is_held_back(text: Text) -> None:
    pieces, made = unfold(text, "a<b<end", stops=("<end>",))
    assert pieces == ["a", "", "<b", "", "", "", "", "<end"]
    assert made.stopped_by is None
    pieces, made = unfold(text, "a<end>more", stops=("<end>",))
    assert "".join(pieces) == "a"
    assert made.stopped_by == "<end>"
    pieces, _ = unfold(text, "a<end>more", stops=("<end>",), include_stop=True)
    assert "".join(pieces) == "a<end>"


def test_special_tokens_are_skipped_or_shown(text: Text) -> None:
    assert "".join(unfold(text, "a<|im_end|>b")[0]) == "ab"
    assert "".join(unfold(text, "a<|im_end|>b", skip_special=False)[0]) == "a<|im_end|>b"
    assert "".join(unfold(text, "b", prompt="x 日本<|im_start|>")[0]) == "b"


# -- conversations ------------------------------------------------------------------------------------------------


def test_a_chat_is_rendered_by_the_models_template(text: Text) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert text.render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.render(messages, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def test_the_last_message_can_be_continued(text: Text) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Answer:"}]
    shown = text.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert shown.endswith("<|im_start|>assistant\nAnswer:")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, "messages.0 has no role"),
        ({"role": "user", "content": 3}, "must be a text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": [4]}, "'int'"),
    ],
)
def test_messages_that_cannot_be_read_are_named(text: Text, message: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        text.render([message])
    assert caught.value.status == 400


def test_a_template_that_refuses_is_the_requests_fault(tiny_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate"):
        Text(tokenizer).render([{"role": "user", "content": "Hi"}])


def test_a_template_that_knows_tools_gets_them_with_arguments_as_data(tiny_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %};{% endfor %}"
    )
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "w", "arguments": '{"city": "Oslo"}'}}],
    }
    shown = Text(tokenizer).render([{"role": "user", "content": "Hi"}, called], tools=[TOOL])
    assert shown == "[weather]user:Hi;assistant:Oslo;"
    called["tool_calls"][0]["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(ApiError, match="no JSON"):
        Text(tokenizer).render([called])


def test_a_template_without_tools_is_told_of_them_in_words(text: Text) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it cold?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "-3"},
    ]
    shown = text.render(messages, tools=[TOOL])
    system, _, assistant, result, opened = shown.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\nYou may call")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in system
    assert assistant == (
        'assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    )
    assert result == "user\n<tool_response>\n-3\n</tool_response><|im_end|>\n"
    assert opened == "assistant\n"
    assert told_in_words(messages[1:2], [TOOL])[0]["role"] == "system"
    assert told_in_words(messages[1:2], None) == [messages[1]]


# -- tool calls -----------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def read(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(**options)
    said = ""
    for piece in pieces:
        more, made = reader.add(piece)
        said += more
        assert made == reader.calls[len(reader.calls) - len(made) :]
    return said + reader.finish(), [(call.name, call.arguments) for call in reader.calls]


ONE = ("weather", '{"city": "Oslo"}')


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("just text", "just text", []),
        (CALL, "", [ONE]),
        (f"Let me see. {CALL}", "Let me see. ", [ONE]),
        (f"{CALL}\n{CALL} and more", "", [ONE, ONE]),
        (CALL[:-3], CALL[:-3], []),  # cut off
        ("a <tool", "a <tool", []),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "f", "parameters": {"a": "é"}}</tool_call>', "", [("f", '{"a": "é"}')]),
        (f"{CALL}\n<tool_call>cut", "<tool_call>cut", [ONE]),
    ],
)
def test_calls_are_read_however_the_text_comes(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    for size in (1, 3, 1000):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(pieces) == (said, calls)


def test_only_as_many_calls_as_wanted_count() -> None:
    assert read([CALL, CALL], most=1) == ("", [ONE])


def test_text_is_said_as_soon_as_it_cannot_begin_a_call() -> None:
    reader = CallReader()
    assert [reader.add(piece)[0] for piece in ("Hi", " <", "b", "<tool_c", "all>")] == ["Hi", " ", "<b", "", ""]


def test_calls_are_shown_as_replies_and_streams_have_them() -> None:
    call = ToolCall("f", "{}")
    assert call.call_id != ToolCall("f", "{}").call_id
    whole = {"id": call.call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert call.shown() == whole
    assert call.shown(2) == {"index": 2, **whole}
