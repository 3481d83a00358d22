"""Counting tokens of chats: as the model's own template and tokenizer do, and as an estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from coterie.errors import BaseModelError, ConfigError
from coterie.inference.counting import ByteCounter, TokenizerCounter, counter_for

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which colour is the sky? 天空是什么颜色？"}
ASSISTANT = {"role": "assistant", "content": "Blue."}


@pytest.fixture
def model(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's tokenizer files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_path / name).exists():
            (tmp_path / name).write_bytes((tiny_path / name).read_bytes())
    return tmp_path


def opened_by(template: str, model: Path) -> TokenizerCounter:
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return TokenizerCounter(model)


def test_a_chat_is_counted_as_transformers_renders_it(tiny_path: Path) -> None:
    counter, oracle = TokenizerCounter(tiny_path), AutoTokenizer.from_pretrained(tiny_path)
    for messages in ([SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER]):
        text = oracle.apply_chat_template(messages, tokenize=False)
        assert counter.count_tokens_from_messages(messages) == len(oracle.encode(text, add_special_tokens=False))
    assert counter.encode(USER["content"]) == oracle.encode(USER["content"], add_special_tokens=False)
    assert counter.decode(counter.encode("two words")) == "two words"


def test_what_a_template_opens_every_chat_with_is_counted_once_and_apart(model: Path) -> None:
    plain = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}[a]{% endif %}"
    opening = "{% if messages[0]['role'] != 'system' %}[system]You are a helpful assistant.\n{% endif %}"
    bare, opened = opened_by(plain, model), opened_by(opening + plain, model)
    header = len(bare.encode("[a]"))
    assert bare.overhead == header
    assert opened.overhead == header + len(opened.encode("[system]You are a helpful assistant.\n"))
    for messages in ([USER], [USER, ASSISTANT], [SYSTEM, USER]):
        assert opened.count_tokens_from_messages(messages) == bare.count_tokens_from_messages(messages)
    # so single messages add up
    whole = opened.count_tokens_from_messages([USER, ASSISTANT, USER])
    assert whole == sum(opened.count_tokens_from_messages([m]) for m in (USER, ASSISTANT, USER))
    assert opened.count_tokens_from_messages([]) == 0


def test_tool_calls_and_composed_content_count(tiny_path: Path) -> None:
    counter = TokenizerCounter(tiny_path)
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]
    empty = {"role": "assistant", "content": None}
    called = counter.count_tokens_from_messages([SYSTEM, {**empty, "tool_calls": calls}])
    assert called > counter.count_tokens_from_messages([SYSTEM, empty]) + 10
    parts = {"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "colour?"}]}
    plain = {"role": "user", "content": "Which colour?"}
    assert counter.count_tokens_from_messages([parts]) == counter.count_tokens_from_messages([plain])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such role') }}",
        "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}",
        "{% not jinja",
        "",
    ],
)
def test_a_template_that_fails_does_not_stop_a_conversation(model: Path, template: str) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    counter = opened_by(template, model)
    count = counter.count_tokens_from_messages([SYSTEM, USER])
    text = len(counter.encode(SYSTEM["content"])) + len(counter.encode(USER["content"]))
    assert text < count < text + 100


def test_marks_for_training_in_a_template_make_no_text(model: Path) -> None:
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{%- endgeneration -%}{% endfor %}"
    counts = [opened_by(t, model).count_tokens_from_messages([SYSTEM, USER]) for t in (plain, marked)]
    assert counts[0] == counts[1]


def test_a_template_cannot_reach_out_of_its_sandbox(model: Path) -> None:
    counter = opened_by("{{ ''.__class__.__mro__[1].__subclasses__() }}", model)
    assert counter.count_tokens_from_messages([SYSTEM]) < 100


def test_the_template_may_stand_in_the_tokenizers_config(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    once, twice = "{{ messages[0]['content'] }}", "{{ messages[0]['content'] * 2 }}"
    found = []
    for template in (once, [{"name": "tool_use", "template": once}, {"name": "default", "template": twice}]):
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        found.append(TokenizerCounter(model).count_tokens_from_messages([SYSTEM]))
    counter = TokenizerCounter(model)
    assert found == [len(counter.encode("Be brief.")), len(counter.encode("Be brief." * 2))]


def test_without_a_tokenizer_tokens_are_estimated_from_bytes() -> None:
    counter = counter_for(None)
    assert isinstance(counter, ByteCounter)
    assert counter.count_tokens_from_messages([{"role": "user", "content": "a" * 300}]) == 108
    assert counter.decode(counter.encode("天空")) == "天空"


def test_mistakes_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        counter_for(tmp_path / "nowhere")
    with pytest.raises(BaseModelError, match=r"holds no tokenizer\.json"):
        counter_for(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"cannot read .*tokenizer\.json"):
        counter_for(tmp_path)
