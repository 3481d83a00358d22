"""/v1/completions and /v1/chat/completions: what is asked for is what is sampled, and is told as vLLM tells it."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from transformers import AutoTokenizer

from coterie.serve.sampling import log_softmax
from coterie.serve.settings import ServeSettings
from tests.support.serving import Client, Reply, talk
from tests.support.token_engine import MemoryTokenEngine

T = TypeVar("T")
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture
def engine(tokenizer: Any) -> MemoryTokenEngine:
    return MemoryTokenEngine(tokenizer)


def complete(engine: MemoryTokenEngine, prompt: Any = "Hello", **body: Any) -> Reply:
    return talk(engine, lambda client: client.complete(prompt, **body))


def chat(engine: MemoryTokenEngine, *messages: str, **body: Any) -> Reply:
    return talk(engine, lambda client: client.chat(*messages, **body))


def several(engine: MemoryTokenEngine, work: Callable[[Client], Awaitable[T]]) -> T:
    return talk(engine, work)


# -- completions ------------------------------------------------------------------------------------------------------


def test_a_completion_has_the_shape_clients_know(engine: MemoryTokenEngine) -> None:
    engine.says("the task")
    reply = complete(engine, model="base", user="somebody", unknown_field={"a": 1})
    assert reply.status == 200
    data = reply.json
    assert data.pop("id").startswith("cmpl-")
    assert isinstance(data.pop("created"), int)
    assert data == {
        "object": "text_completion",
        "model": "base",
        "choices": [
            {
                "index": 0,
                "text": "the task",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(engine.tokenizer.encode("Hello")),
            "total_tokens": len(engine.tokenizer.encode("Hello")) + len(engine.tokenizer.encode("the task")) + 1,
            "completion_tokens": len(engine.tokenizer.encode("the task")) + 1,  # the end of the turn is a token
            "prompt_tokens_details": None,
        },
    }


def test_sixteen_tokens_where_a_completion_does_not_say(engine: MemoryTokenEngine) -> None:
    engine.says("red", end=False)
    choice = complete(engine).choice
    assert (choice["text"], choice["finish_reason"]) == ("red" * 16, "length")


def test_prompts_may_be_texts_or_ids_one_or_many(engine: MemoryTokenEngine) -> None:
    ids = engine.tokenizer.encode("red blue")
    prompts = ("red blue", ids, ["red blue"], [ids])
    replies = [complete(engine, prompt, seed=3, max_tokens=5) for prompt in prompts]
    assert {request.prompt_ids for request in engine.requests} == {tuple(ids)}
    assert len({reply.choice["text"] for reply in replies}) == 1
    engine.requests.clear()
    reply = complete(engine, ["red", "blue"], n=2, seed=5, max_tokens=3, echo=True)
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in reply.json["choices"]] == ["red", "red", "blu", "blu"]
    assert [request.seed for request in engine.requests] == [5, 6, 5, 6]
    assert reply.json["usage"]["prompt_tokens"] == len(engine.tokenizer.encode("red")) + len(
        engine.tokenizer.encode("blue")
    )
    assert reply.json["usage"]["completion_tokens"] == 12


def test_the_same_seed_gives_the_same_answer(engine: MemoryTokenEngine) -> None:
    texts = [complete(engine, seed=seed, max_tokens=12).choice["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    drawn = [complete(engine, max_tokens=12).choice["text"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    settings = ServeSettings(model="base", seed=4)
    again = [talk(engine, lambda client: client.complete(max_tokens=12), settings).choice["text"] for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("body", "text", "reason"),
    [
        ({"stop": "<"}, "one two ", "<"),
        ({"stop": ["zzz", "two <st"]}, "one ", "two <st"),
        ({"stop": ["<stop>"], "include_stop_str_in_output": True}, "one two <stop>", "<stop>"),
        ({"stop": "e", "min_tokens": 12}, "one two <stop> thr", "e"),
        ({"stop": "never"}, "one two <stop> three", None),
    ],
)
def test_stop_strings(engine: MemoryTokenEngine, body: dict[str, Any], text: str, reason: str | None) -> None:
    engine.says("one two <stop> three")
    for stream in (False, True):
        reply = complete(engine, max_tokens=50, stream=stream, **body)
        if stream:
            assert "".join(event["choices"][0]["text"] for event in reply.events) == text
            choice = reply.events[-1]["choices"][0]
        else:
            choice = reply.choice
            assert choice["text"] == text
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)


def test_stop_tokens_are_named_and_not_part_of_the_text(engine: MemoryTokenEngine) -> None:
    engine.says("red blue green")
    stop = engine.tokenizer.encode(" blue")
    assert len(stop) == 1
    choice = complete(engine, stop_token_ids=stop, return_token_ids=True).choice
    assert (choice["text"], choice["stop_reason"], choice["token_ids"][-1]) == ("red", stop[0], stop[0])
    choice = complete(engine, stop_token_ids=stop, include_stop_str_in_output=True).choice
    assert choice["text"] == "red blue"


def test_the_end_of_a_turn_can_be_ignored_or_put_off(engine: MemoryTokenEngine) -> None:
    engine.says("a")
    assert complete(engine).choice["finish_reason"] == "stop"
    choice = complete(engine, ignore_eos=True, max_tokens=6).choice
    assert (choice["text"], choice["finish_reason"]) == ("aaa", "length")
    choice = complete(engine, min_tokens=4, return_token_ids=True).choice
    assert len(choice["token_ids"]) >= 4
    assert engine.stop_ids[0] not in choice["token_ids"][:4]


def test_temperature_penalties_and_truncation_reach_the_policy(engine: MemoryTokenEngine) -> None:
    complete(engine, temperature=0.5, top_p=0.9, top_k=7, min_p=0.01)
    request = engine.requests[-1]
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.9, 7, 0.01)
    complete(engine, temperature=1e-6, top_k=-1)
    assert (engine.requests[-1].temperature, engine.requests[-1].top_k) == (0.0, 0)
    engine.says("red", end=False)
    # 40 above all others: presence and frequency bring it down by 2 and by 2 a time
    said = complete(engine, temperature=0, max_tokens=30, presence_penalty=2, frequency_penalty=2).choice["text"]
    assert said.startswith("red" * 15)
    assert said != "red" * 30


def test_bias_and_allowed_tokens_hold_and_probabilities_know_of_them(engine: MemoryTokenEngine) -> None:
    prompt = tuple(engine.tokenizer.encode("red blue"))
    row = engine.logits(None, prompt, 0).astype(np.float64)
    allowed, bias = [40, 20, 30], {"20": 1.5, "99": -400.0, "7": 100.0}
    reply = complete(
        engine, list(prompt), allowed_token_ids=allowed, logit_bias=bias, temperature=0.7, max_tokens=1, logprobs=5,
        return_token_ids=True, return_tokens_as_token_ids=True, seed=0,
    )  # fmt: skip
    scores = {token: (row[token] + (1.5 if token == 20 else 0)) / 0.7 for token in allowed}
    total = math.log(sum(math.exp(score) for score in scores.values()))
    (top,) = reply.choice["logprobs"]["top_logprobs"]
    assert top == pytest.approx({f"token_id:{token}": score - total for token, score in scores.items()}, abs=1e-5)
    assert reply.choice["token_ids"][0] in allowed
    assert reply.choice["prompt_token_ids"] == list(prompt)
    assert reply.choice["logprobs"]["tokens"] == [f"token_id:{reply.choice['token_ids'][0]}"]
    clamped = complete(engine, list(prompt), logit_bias={"7": 1e9}, max_tokens=1, temperature=0, return_token_ids=True)
    assert clamped.choice["token_ids"] == [7]


def test_one_allowed_token_is_certain(engine: MemoryTokenEngine) -> None:
    choice = complete(engine, allowed_token_ids=[50], max_tokens=2, logprobs=2, return_token_ids=True).choice
    assert (choice["token_ids"], choice["logprobs"]["token_logprobs"]) == ([50, 50], [0.0, 0.0])


def test_log_probabilities_of_a_completion(engine: MemoryTokenEngine) -> None:
    choice = complete(engine, "red", logprobs=2, max_tokens=4, seed=1, return_token_ids=True).choice
    shown = choice["logprobs"]
    prefix = tuple(engine.tokenizer.encode("red"))
    offset = 0
    for i, token in enumerate(choice["token_ids"]):
        row = log_softmax(engine.logits(None, prefix, i).astype(np.float64))
        name = engine.tokenizer.decode([token])
        best = np.argsort(-row, kind="stable")[:2]
        wanted = {name: row[token], **{engine.tokenizer.decode([int(j)]): row[j] for j in best}}
        assert shown["tokens"][i] == name
        assert shown["token_logprobs"][i] == pytest.approx(row[token], abs=1e-5)
        assert shown["top_logprobs"][i] == pytest.approx(wanted, abs=1e-5)
        assert shown["text_offset"][i] == offset
        offset += len(name)
        prefix = (*prefix, token)
    alone = complete(engine, logprobs=0, max_tokens=1).choice["logprobs"]
    assert list(alone["top_logprobs"][0]) == alone["tokens"]


def test_log_probabilities_of_a_prompt(engine: MemoryTokenEngine) -> None:
    ids = engine.tokenizer.encode("red blue green")
    reply = complete(engine, ids, prompt_logprobs=1, max_tokens=1, temperature=0.3, logit_bias={"5": 4})
    first, *rest = reply.choice["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(ids) - 1
    for i, entry in enumerate(rest, start=1):
        row = log_softmax(engine.logits(None, tuple(ids[:i]), 0).astype(np.float64))  # neither temperature nor bias
        mine = entry[str(ids[i])]
        assert mine["logprob"] == pytest.approx(row[ids[i]], abs=1e-5)
        assert mine["rank"] == 1 + int((row > row[ids[i]]).sum())
        assert mine["decoded_token"] == engine.tokenizer.decode([ids[i]])
        best = int(row.argmax())
        assert entry[str(best)]["rank"] == 1
        assert set(entry) == {str(ids[i]), str(best)}


def test_echo_says_the_prompt_with_its_log_probabilities(engine: MemoryTokenEngine) -> None:
    engine.says("!")
    ids = engine.tokenizer.encode("red blue")
    choice = complete(engine, "red blue", echo=True, logprobs=1, max_tokens=2).choice
    assert choice["text"] == "red blue!"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 2
    engine.requests.clear()
    reply = complete(engine, "red blue", echo=True, logprobs=0, max_tokens=0)
    assert (reply.choice["text"], reply.choice["finish_reason"]) == ("red blue", "length")
    assert "".join(reply.choice["logprobs"]["tokens"]) == "red blue"
    assert reply.json["usage"]["completion_tokens"] == 0
    assert engine.requests == []
    (event,) = complete(engine, "red blue", echo=True, max_tokens=0, stream=True).events
    assert event["choices"][0]["text"] == "red blue"


def test_choices_however_they_are_asked_for(engine: MemoryTokenEngine) -> None:
    for body in ({"structured_outputs": {"choice": ["red", "blue"]}}, {"guided_choice": ["red", "blue"]}):
        texts = {complete(engine, seed=seed, temperature=4, **body).choice["text"] for seed in range(12)}
        assert texts == {"red", "blue"}
        assert complete(engine, **body).choice["finish_reason"] == "stop"


def test_a_schema_binds_a_completion(engine: MemoryTokenEngine) -> None:
    for body in ({"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}):
        reply = complete(engine, "x", max_tokens=200, **body)
        assert reply.choice["text"].startswith('{"city": "')
    assert complete(engine, guided_regex="[0-9]{3}").choice["text"].isdecimal()


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_says_what_the_whole_says(engine: MemoryTokenEngine) -> None:
    body: dict[str, Any] = {"n": 3, "seed": 9, "max_tokens": 9, "logprobs": 1, "return_token_ids": True, "stop": ["e"]}
    whole = complete(engine, "red 日", **body).json
    reply = complete(engine, "red 日", stream=True, stream_options={"include_usage": True}, **body)
    *events, last = reply.events
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [token for one in mine for token in one["token_ids"]] == choice["token_ids"]
        for key in choice["logprobs"]:
            assert [value for one in mine for value in one["logprobs"][key]] == choice["logprobs"][key]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert all(one["prompt_token_ids"] is None for one in mine[1:])


def test_usage_can_come_with_every_event(engine: MemoryTokenEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for reply in (
        complete(engine, stream=True, stream_options=options, max_tokens=3),
        chat(engine, stream=True, stream_options=options, max_tokens=3),
    ):
        counts = [event["usage"]["completion_tokens"] for event in reply.events]
        assert counts == sorted(counts)
        assert counts[-1] <= 3


# -- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_has_the_shape_clients_know(engine: MemoryTokenEngine) -> None:
    engine.says("the task")
    reply = chat(engine, "Hi", return_token_ids=True)
    data = reply.json
    assert data.pop("id").startswith("chatcmpl-")
    assert isinstance(data.pop("created"), int)
    prompt = engine.tokenizer.encode(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    tokens = [*engine.tokenizer.encode("the task"), engine.stop_ids[0]]
    assert data == {
        "object": "chat.completion",
        "model": "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "the task", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": tokens,
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "total_tokens": len(prompt) + len(tokens),
            "completion_tokens": len(tokens),
            "prompt_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": prompt,
    }


def test_a_chat_lasts_as_long_as_there_is_room(tokenizer: Any) -> None:
    engine = MemoryTokenEngine(tokenizer, context=40)
    engine.says("the", end=False)
    reply = chat(engine)
    assert reply.json["usage"]["total_tokens"] == 40
    assert reply.choice["finish_reason"] == "length"
    limited = ServeSettings(model="base", max_tokens=5, max_model_len=30)
    assert talk(engine, lambda client: client.chat(), limited).json["usage"]["completion_tokens"] == 5
    assert chat(engine, max_tokens=9, max_completion_tokens=4).json["usage"]["completion_tokens"] == 4


def test_the_last_message_is_continued(engine: MemoryTokenEngine) -> None:
    engine.says(" red")
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    for body in (continued, {"continue_final_message": True}):
        reply = chat(engine, "Colour?", "Answer:", **body)
        assert engine.tokenizer.decode(engine.requests[-1].prompt_ids).endswith("<|im_start|>assistant\nAnswer:")
        assert reply.choice["message"] == {"role": "assistant", "content": " red", "refusal": None}
    assert chat(engine, "Colour?", "Answer:", echo=True, **continued).choice["message"]["content"] == "Answer: red"
    events = chat(engine, "Colour?", "Answer:", echo=True, stream=True, **continued).events
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Answer: red"


def test_log_probabilities_of_a_chat(engine: MemoryTokenEngine) -> None:
    choice = chat(engine, logprobs=True, top_logprobs=3, max_tokens=5, seed=2, return_token_ids=True).choice
    assert [one["token"] for one in choice["logprobs"]["content"]] == [
        engine.tokenizer.decode([token]) for token in choice["token_ids"]
    ]
    for one in choice["logprobs"]["content"]:
        assert one["bytes"] == list(one["token"].encode())
        assert len(one["top_logprobs"]) == 3
        values = [other["logprob"] for other in one["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert one["logprob"] <= values[0] + 1e-9
    assert chat(engine, logprobs=True, max_tokens=2).choice["logprobs"]["content"][0]["top_logprobs"] == []
    named = chat(engine, logprobs=True, return_tokens_as_token_ids=True, max_tokens=1, return_token_ids=True).choice
    assert named["logprobs"]["content"][0]["token"] == f"token_id:{named['token_ids'][0]}"
    assert chat(engine, prompt_logprobs=0, max_tokens=1).json["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_a_schema_binds_a_chat(engine: MemoryTokenEngine, body: dict[str, Any]) -> None:
    engine.says('{"city": "Rome"}')
    choice = chat(engine, n=1, **body).choice
    assert json.loads(choice["message"]["content"]) == {"city": "Rome"}
    assert choice["finish_reason"] == "stop"
    engine.says("I would rather not.")
    assert chat(engine, max_tokens=40, **body).choice["message"]["content"].startswith('{"city": "')


def test_any_json_object_can_be_asked_for(engine: MemoryTokenEngine) -> None:
    engine.says('{"a": [1, 2]}')
    assert json.loads(chat(engine, response_format={"type": "json_object"}).choice["message"]["content"]) == {
        "a": [1, 2]
    }
    engine.says("words")
    assert chat(engine, response_format={"type": "text"}).choice["message"]["content"] == "words"


# -- tools ------------------------------------------------------------------------------------------------------------


def deltas(reply: Reply) -> tuple[str, list[Any], str]:
    """Content, tool calls and finish reason of a streamed chat."""
    choices = [event["choices"][0] for event in reply.events]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    return content, calls, choices[-1]["finish_reason"]


def test_a_tool_is_called_when_the_model_wants_to(engine: MemoryTokenEngine) -> None:
    engine.says(f"Let me see. {CALL}")
    choice = chat(engine, tools=TOOLS).choice
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me see. "
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert call["id"]
    assert choice["finish_reason"] == "tool_calls"
    content, calls, finish = deltas(chat(engine, tools=TOOLS, stream=True))
    assert (content, finish) == ("Let me see. ", "tool_calls")
    assert [(call["index"], call["function"]) for call in calls] == [
        (0, choice["message"]["tool_calls"][0]["function"])
    ]
    assert "weather" in engine.tokenizer.decode(engine.requests[-1].prompt_ids)


def test_several_calls_at_once_unless_told_otherwise(engine: MemoryTokenEngine) -> None:
    engine.says(f"{CALL}\n{CALL}")
    message = chat(engine, tools=TOOLS, tool_choice="required").choice["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "weather"]
    assert message["content"] is None
    _, calls, _ = deltas(chat(engine, tools=TOOLS, stream=True))
    assert [call["index"] for call in calls] == [0, 1]
    for choice in ("auto", "required"):
        message = chat(engine, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=400).choice[
            "message"
        ]
        assert len(message["tool_calls"]) == 1


def test_a_tool_must_be_called_where_it_is_required(engine: MemoryTokenEngine) -> None:
    engine.says("No.")
    for seed in range(4):
        choice = chat(engine, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed).choice
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in ("weather", "wait")
        assert choice["finish_reason"] == "tool_calls"
        json.loads(call["function"]["arguments"])


def test_a_named_tool_is_called(engine: MemoryTokenEngine) -> None:
    engine.says(CALL)
    named = {"type": "function", "function": {"name": "wait"}}
    choice = chat(engine, tools=TOOLS, tool_choice=named).choice
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "wait", "arguments": "{}"}
    assert choice["finish_reason"] == "stop"  # as with OpenAI: it was not the model's decision
    content, calls, finish = deltas(chat(engine, tools=TOOLS, tool_choice=named, stream=True))
    assert (content, len(calls), finish) == ("", 1, "stop")


def test_no_tool_is_called_where_none_may_be(engine: MemoryTokenEngine) -> None:
    engine.says(CALL)
    choice = chat(engine, tools=TOOLS, tool_choice="none").choice
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_is_text(engine: MemoryTokenEngine) -> None:
    engine.says(CALL)
    choice = chat(engine, tools=TOOLS, max_tokens=20).choice
    assert choice["finish_reason"] == "length"
    assert CALL.startswith(choice["message"]["content"])
    content, calls, finish = deltas(chat(engine, tools=TOOLS, max_tokens=20, stream=True))
    assert (content, calls, finish) == (choice["message"]["content"], [], "length")


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_and_back(engine: MemoryTokenEngine) -> None:
    async def both(client: Client) -> tuple[Any, Any, Any, Any]:
        made = (await client.post("/tokenize", prompt="red 日", return_token_strs=True)).json
        back = (await client.post("/detokenize", tokens=made["tokens"])).json
        chat = (await client.post("/tokenize", messages=[{"role": "user", "content": "Hi"}])).json
        wrong = await client.post("/detokenize", tokens=[10**6])
        return made, back, chat, wrong

    made, back, asked, wrong = several(engine, both)
    assert made["tokens"] == engine.tokenizer.encode("red 日")
    assert (made["count"], len(made["token_strs"]), made["max_model_len"]) == (len(made["tokens"]),) * 2 + (2048,)
    assert back == {"prompt": "red 日"}
    assert engine.tokenizer.decode(asked["tokens"]).endswith("<|im_start|>assistant\n")
    assert wrong.status == 400
