"""The fake server: exact numbers, vLLM's manners, its queue, and every fault it can be told to have.

That its log-probabilities are the softmax it says is also a property test (`tests/property/test_fake_exact.py`); that a
transport reads it right is the transports' contract.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import Any

import aiohttp
import pytest

from coterie.errors import AdapterError, EngineError
from coterie.inference.fake import (
    ByteTokenizer,
    FakePolicy,
    FakeProcess,
    FakeServer,
    HubTokenizer,
    adapter_weights,
    distribution,
    token_logprobs,
    write_adapter,
)
from coterie.lm.tiny import CHAT_TEMPLATE, TURN_END, tiny_tokenizer
from tests.support.loops import Runs, run
from tests.support.virtual import now, run_hasty

TOKENS = ByteTokenizer()
IDS = [10, 11, 12]
USER = {"role": "user", "content": "hi"}


class Client:
    """Plain HTTP, so that nothing stands between the tests and the server."""

    def __init__(self, server: FakeServer | FakeProcess) -> None:
        self.server = server

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> tuple[int, str]:
        async with self._session.get(self.server.url.removesuffix("/v1") + path) as response:
            return response.status, await response.text()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(self.server.url + path, json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith("{") else text

    async def complete(self, **body: Any) -> Any:
        """The first choice; its `all` is the whole answer."""
        chat = "messages" in body
        prompt = {} if chat else {"prompt": IDS}
        asked = {"model": "fake-model", "return_token_ids": True, "return_tokens_as_token_ids": True, **prompt, **body}
        status, answer = await self.post("/chat/completions" if chat else "/completions", asked)
        assert status == 200, answer
        return {**answer["choices"][0], "all": answer}

    async def refusal(self, **body: Any) -> str:
        chat = "messages" in body
        prompt = {} if chat else {"prompt": IDS}
        status, answer = await self.post("/chat/completions" if chat else "/completions", {**prompt, **body})
        assert status == answer["error"]["code"]
        return f"{status} {answer['error']['message']}"

    async def events(self, **body: Any) -> list[Any]:
        chat = "messages" in body
        prompt = {} if chat else {"prompt": IDS}
        url = self.server.url + ("/chat/completions" if chat else "/completions")
        async with self._session.post(url, json={**prompt, **body, "stream": True}) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    async def load(self, name: str, path: Path, **fields: Any) -> tuple[int, Any]:
        return await self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})


def with_client(play: Any, loop: Runs = asyncio.run, **settings: Any) -> Any:
    async def go() -> Any:
        async with FakeServer(**settings) as server, Client(server) as client:
            return await play(server, client)

    return run(go(), loop)


# -- the model --------------------------------------------------------------------------------------------------


def test_a_distribution_sums_to_one_and_depends_on_everything_it_says() -> None:
    base = FakePolicy(seed=0, vocabulary=259)
    whole = distribution(base, IDS)
    assert math.fsum(math.exp(p) for p in whole.values()) == pytest.approx(1, abs=1e-12)
    assert list(whole) == list(range(259))
    assert distribution(base, IDS) == whole
    for other in (
        distribution(FakePolicy(1, 259), IDS),
        distribution(FakePolicy(0, 259, "some weights"), IDS),
        distribution(base, [10, 12, 11]),
        distribution(base, IDS[1:]),
    ):
        assert max(abs(other[i] - whole[i]) for i in whole) > 0.1
    assert max(whole.values()) - min(whole.values()) > 3  # far from uniform


def test_bias_allowed_set_and_temperature_are_those_of_a_softmax() -> None:
    policy = FakePolicy(seed=2, vocabulary=50)
    odds = policy.logits(IDS, [3, 9])
    p = distribution(policy, IDS, allowed=[9, 3], bias={3: 1.0}, temperature=0.5)
    assert list(p) == [3, 9]
    assert p[3] - p[9] == pytest.approx((odds[0] + 1.0 - odds[1]) / 0.5)
    greedy = distribution(policy, IDS, allowed=[3, 9], temperature=0.0)
    assert greedy == distribution(policy, IDS, allowed=[3, 9])


def test_token_logprobs_chain_the_distribution() -> None:
    policy = FakePolicy(seed=2, vocabulary=50)
    assert token_logprobs(policy, [7, 8, 9]) == (distribution(policy, [7])[8], distribution(policy, [7, 8])[9])
    assert token_logprobs(policy, [7]) == ()


def test_sampling_follows_the_distribution() -> None:
    allowed = TOKENS.encode("abcd")

    async def play(server: FakeServer, client: Client) -> None:
        body = {"max_tokens": 1, "allowed_token_ids": allowed, "temperature": 1.3}
        drawn = Counter([(await client.complete(seed=seed, **body))["token_ids"][0] for seed in range(400)])
        for token, logprob in distribution(server.policy(), IDS, allowed=allowed, temperature=1.3).items():
            p = math.exp(logprob)
            assert drawn[token] / 400 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 400))
        unseeded = {(await client.complete(max_tokens=4))["text"] for _ in range(8)}
        assert len(unseeded) == 8

    with_client(play)


def test_adapters_are_told_apart_by_content_not_by_name_or_place(tmp_path: Path) -> None:
    one, same, other = (write_adapter(tmp_path / n, seed) for n, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert adapter_weights(one) == adapter_weights(same) != adapter_weights(other)
    assert adapter_weights(write_adapter(tmp_path / "wide", 1, rank=8)) != adapter_weights(one)
    assert adapter_weights(write_adapter(tmp_path / "new", 1, zero=True)) == ""
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert adapter_weights(one) != adapter_weights(same)


def test_peft_can_read_what_write_adapter_writes(tmp_path: Path) -> None:
    from safetensors import safe_open

    directory = write_adapter(tmp_path / "a", 1, rank=3)
    with safe_open(directory / "adapter_model.safetensors", "numpy") as file:
        shapes = {name.split(".")[-2]: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {"lora_A": (3, 8), "lora_B": (8, 3)}


@pytest.mark.parametrize("broken", ["missing", "no config", "no tensors", "not safetensors", "cut", "odd config"])
def test_what_is_no_adapter_is_refused(tmp_path: Path, broken: str) -> None:
    directory = write_adapter(tmp_path / "a", 1)
    tensors, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    blob = tensors.read_bytes()
    {
        "missing": lambda: rmtree(directory),
        "no config": config.unlink,
        "no tensors": tensors.unlink,
        "not safetensors": lambda: tensors.write_bytes(b"weights"),
        "cut": lambda: tensors.write_bytes(blob[:30]),
        "odd config": lambda: config.write_text('{"r": 4}'),
    }[broken]()
    with pytest.raises(AdapterError, match="a"):
        adapter_weights(directory)


# -- answers ----------------------------------------------------------------------------------------------------


def test_text_prompts_several_prompts_and_several_answers() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        one = await client.complete(prompt="ab", n=2, seed=1, max_tokens=3)
        assert [c["index"] for c in one["all"]["choices"]] == [0, 1]
        assert one["prompt_token_ids"] == TOKENS.encode("ab")
        assert one["token_ids"] != one["all"]["choices"][1]["token_ids"]
        assert one["all"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
        several = await client.complete(prompt=[[5, 6], [7]], max_tokens=1)
        assert [c["prompt_token_ids"] for c in several["all"]["choices"]] == [[5, 6], [7]]
        words = await client.complete(prompt=["a", "b"], max_tokens=1)
        assert len(words["all"]["choices"]) == 2

    with_client(play)


def test_stop_tokens_and_stop_strings() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.say("one STOP two", times=4)
        cut = await client.complete(max_tokens=50, stop=["STOP", "never"])
        assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == ("one ", "stop", "STOP")
        assert TOKENS.decode(cut["token_ids"]) == "one STOP"  # ids are kept, as in vLLM
        kept = await client.complete(max_tokens=50, stop="STOP", include_stop_str_in_output=True)
        assert kept["text"] == "one STOP"
        stop = TOKENS.encode("w")[0]
        by_id = await client.complete(max_tokens=50, stop_token_ids=[stop])
        assert (by_id["text"], by_id["token_ids"][-1], by_id["stop_reason"]) == ("one STOP t", stop, stop)
        ended = await client.complete(max_tokens=50)
        assert (ended["text"], ended["token_ids"][-1], ended["stop_reason"]) == ("one STOP two", TOKENS.END, None)
        ends = {"max_tokens": 5, "allowed_token_ids": [TOKENS.END, 50], "logit_bias": {str(TOKENS.END): 50}}
        assert len((await client.complete(**ends))["token_ids"]) == 1
        assert (await client.complete(**ends, ignore_eos=True))["finish_reason"] == "length"
        late = await client.complete(**ends, min_tokens=3)
        assert late["token_ids"] == [50, 50, 50, TOKENS.END]

    with_client(play)


def test_truncated_sampling_reports_what_it_samples_from() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        whole = distribution(server.policy(), IDS)
        best = sorted(whole, key=lambda token: -whole[token])
        for seed in range(5):
            kept = await client.complete(max_tokens=1, top_k=3, logprobs=0, seed=seed)
            (token,) = kept["token_ids"]
            assert token in best[:3]
            mass = sum(math.exp(whole[t]) for t in best[:3])
            expected = whole[token] - math.log(mass)
            assert kept["logprobs"]["token_logprobs"][0] == pytest.approx(expected, abs=1e-9)
        only = await client.complete(max_tokens=1, top_p=1e-6, logprobs=0)
        assert (only["token_ids"], only["logprobs"]["token_logprobs"]) == ([best[0]], [0.0])
        assert (await client.complete(max_tokens=1, min_p=1.0, logprobs=0))["token_ids"] == [best[0]]

    with_client(play)


def test_raw_log_probabilities_leave_out_what_shaped_sampling() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        made = await client.complete(
            max_tokens=1, temperature=0.4, allowed_token_ids=[40, 50], logit_bias={"40": 5}, logprobs=2
        )
        whole = distribution(server.policy(), IDS)
        (token,) = made["token_ids"]
        assert made["logprobs"]["token_logprobs"] == [whole[token]]
        best = sorted(whole, key=lambda t: -whole[t])[:2]
        named = {f"token_id:{t}": whole[t] for t in (token, *best)}
        assert made["logprobs"]["top_logprobs"] == [named]

    with_client(play, logprobs_mode="raw_logprobs")


def test_echo_and_prompt_log_probabilities_are_the_models_own() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        own = token_logprobs(server.policy(), IDS)
        prompt = await client.complete(max_tokens=0, echo=True, logprobs=0, temperature=0.3)
        assert prompt["logprobs"]["token_logprobs"] == [None, *own]
        both = await client.complete(max_tokens=2, echo=True, logprobs=0, prompt="ab", return_token_ids=False)
        assert both["text"].startswith("ab")
        assert len(both["logprobs"]["tokens"]) == 4
        asked = await client.complete(max_tokens=1, prompt_logprobs=2)
        steps = asked["prompt_logprobs"]
        assert steps[0] is None
        assert [steps[i][str(IDS[i])]["logprob"] for i in (1, 2)] == list(own)
        assert all(len(step) in (2, 3) for step in steps[1:])

    with_client(play)


def test_chats_are_rendered_and_continued() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        messages = [{"role": "system", "content": [{"type": "text", "text": "be"}]}, USER]
        made = await client.complete(messages=messages, max_tokens=2, logprobs=True, top_logprobs=2)
        text = "system\nbe", "user\nhi", "assistant\n"
        expected = [1, *TOKENS.encode(text[0]), 2, 13, 1, *TOKENS.encode(text[1]), 2, 13, 1, *TOKENS.encode(text[2])]
        assert made["all"]["prompt_token_ids"] == expected
        assert made["message"]["role"] == "assistant"
        entry = made["logprobs"]["content"][0]
        assert entry["token"] == f"token_id:{made['token_ids'][0]}"
        assert len(entry["top_logprobs"]) == 2
        begun = [USER, {"role": "assistant", "content": "yes"}]
        going = await client.complete(messages=begun, continue_final_message=True, add_generation_prompt=False)
        assert going["all"]["prompt_token_ids"][-3:] == TOKENS.encode("yes")
        assert "Cannot set both" in await client.refusal(messages=begun, continue_final_message=True)
        default = await client.complete(messages=[USER], logit_bias={"2": 100})
        assert default["token_ids"] == [2]  # the end token; without max_tokens a chat may go on to the context's end

    with_client(play)


def test_a_choice_is_decoded_under_its_grammar() -> None:
    choices = ["red", "rose", "blue", "redder"]

    async def play(server: FakeServer, client: Client) -> None:
        seen = set()
        for seed in range(60):
            prompt = [*IDS, seed + 3]
            body = {"prompt": prompt, "max_tokens": 20, "structured_outputs": {"choice": choices}}
            made = await client.complete(**body, seed=seed, logprobs=0)
            assert made["finish_reason"] == "stop"
            seen.add(made["text"])
            ids = made["token_ids"]
            assert TOKENS.decode(ids) == made["text"] in choices
            first = distribution(server.policy(), prompt, allowed=TOKENS.encode("rb"))
            assert made["logprobs"]["token_logprobs"][0] == pytest.approx(first[ids[0]], abs=1e-12)
        assert seen == set(choices)

    with_client(play)


def test_tools_and_schemas_are_answered_by_what_fits_them() -> None:
    properties = {
        "a": {"type": "integer", "minimum": 3, "maximum": 4},
        "b": {"enum": ["x", "y"]},
        "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "minItems": 2, "maxItems": 2},
        "e": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "f": {"type": "number", "minimum": 1, "maximum": 2},
        "g": {"type": "string", "minLength": 9, "maxLength": 12},
    }
    schema = {"type": "object", "properties": properties, "$defs": {"d": {"const": 7}}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}} for name in ("like", "post", "follow")
    ]

    def fits(value: Any) -> bool:
        return (
            set(value) == set(properties)
            and value["a"] in (3, 4)
            and value["b"] in "xy"
            and value["c"] == [7, 7]
            and isinstance(value["e"], bool)
            and 1 <= value["f"] <= 2
            and 9 <= len(value["g"]) <= 12
        )

    async def play(server: FakeServer, client: Client) -> None:
        named = {"type": "function", "function": {"name": "post"}}
        called = Counter[str]()
        for seed in range(12):
            body = {"messages": [USER], "seed": seed, "logprobs": True}
            made = await client.complete(**body, tools=tools, tool_choice="required")
            (call,) = made["message"]["tool_calls"]
            assert fits(json.loads(call["function"]["arguments"]))
            assert made["finish_reason"] == "tool_calls"
            assert all(entry["logprob"] == 0.0 for entry in made["logprobs"]["content"])  # nothing else was possible
            called[call["function"]["name"]] += 1
            one = await client.complete(**body, tools=tools, tool_choice=named)
            assert one["message"]["tool_calls"][0]["function"]["name"] == "post"
            shaped = await client.complete(
                **body, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            )
            assert fits(json.loads(shaped["message"]["content"]))
        assert set(called) == {"like", "post", "follow"}
        free = await client.complete(messages=[USER], tools=tools, max_tokens=5)
        assert "tool_calls" not in free["message"]
        server.say_tool("like", {"post_id": 3})
        told = await client.complete(messages=[USER], tools=tools)
        assert told["message"]["tool_calls"][0]["function"] == {"name": "like", "arguments": '{"post_id": 3}'}
        assert "400" in await client.refusal(
            messages=[USER], tools=tools, tool_choice={"type": "function", "function": {"name": "none"}}
        )

    with_client(play)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_adds_up_to_the_whole(chat: bool) -> None:
    prompt: dict[str, Any] = {"messages": [USER], "logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}

    async def play(server: FakeServer, client: Client) -> None:
        for seed in range(6):
            body = {**prompt, "model": "fake-model", "seed": seed, "max_tokens": 12, "return_token_ids": True}
            whole = await client.complete(**body, stop=["e"])
            events = await client.events(**body, stop=["e"], stream_options={"include_usage": True})
            choices = [event["choices"][0] for event in events if event["choices"]]
            text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
            assert text == (whole["message"]["content"] if chat else whole["text"])
            assert [i for c in choices for i in c.get("token_ids", [])] == whole["token_ids"]
            assert choices[-1]["finish_reason"] == whole["finish_reason"]
            assert all(c["finish_reason"] is None for c in choices[:-1])
            assert events[-1]["usage"] == whole["all"]["usage"]
            key = "content" if chat else "token_logprobs"
            parts = [value for c in choices for value in (c.get("logprobs") or {}).get(key, [])]
            plain = await client.complete(**{**body, "return_tokens_as_token_ids": False}, stop=["e"])
            assert parts == plain["logprobs"][key]
            ids = events[0]["prompt_token_ids"] if chat else choices[0]["prompt_token_ids"]
            assert ids == (whole["all"] if chat else whole)["prompt_token_ids"]

    with_client(play)


def test_streamed_tool_calls() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.say_tool("like", {"post": 1})
        events = await client.events(messages=[USER])
        calls = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
        assert [c["function"]["name"] for c in calls] == ["like"]
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"

    with_client(play)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": []}, "400 Either prompt"),
        ({"prompt": [3] * 100}, "400 This model's maximum context length is 64 tokens"),
        ({"prompt": [3, 999]}, "400 Token id 999 is out of vocabulary"),
        ({"prompt": [3, "a"]}, "400 1 validation error"),
        ({"messages": []}, "400 1 validation error"),
        ({"model": "other"}, "404 The model `other` does not exist."),
        ({"temperature": 3}, "400 temperature must be in [0, 2], got 3.0."),
        ({"temperature": "hot"}, "400 1 validation error"),
        ({"max_tokens": 0}, "400 max_tokens must be at least 1, got 0."),
        ({"max_tokens": 1.5}, "400 1 validation error"),
        ({"n": 2, "temperature": 0}, "400 n must be 1 when using greedy sampling, got 2."),
        ({"n": 0}, "400 n must be at least 1"),
        ({"top_p": 0}, "400 top_p must be in (0, 1]"),
        ({"top_k": -2}, "400 top_k must be 0"),
        ({"logprobs": 21}, "400 Requested sample logprobs of 21"),
        ({"allowed_token_ids": []}, "400 allowed_token_ids is not None and empty!"),
        ({"allowed_token_ids": [999]}, "400 allowed_token_ids contains out-of-vocab"),
        ({"allowed_token_ids": "3"}, "400 1 validation error"),
        ({"stop": [3]}, "400 1 validation error"),
        ({"stop_token_ids": [-1]}, "400 stop_token_ids contains out-of-vocab"),
        ({"logit_bias": {"999": 1}}, "400 token_id(s) [999] in logit_bias"),
        ({"logit_bias": {"a": 1}}, "400 1 validation error"),
        ({"stream_options": {"include_usage": True}}, "400 Stream options"),
        ({"stream": True, "prompt_logprobs": 1}, "400 `prompt_logprobs` are not available"),
        ({"messages": [USER], "top_logprobs": 2}, "400 when using `top_logprobs`"),
        ({"cache_salt": ""}, "400 Parameter 'cache_salt' must be a non-empty string"),
        ({"cache_salt": 5}, "400 Parameter 'cache_salt' must be a non-empty string"),
        ({"cache_salt": "a" * 129}, "400 Parameter 'cache_salt' must be at most 128 characters"),
        ({"cache_salt": "a@b"}, "400 Parameter 'cache_salt' must be at most 128 characters"),
        ({"frequency_penalty": 0.5}, "400 The fake server does not imitate frequency_penalty"),
        ({"use_beam_search": True}, "400 The fake server does not imitate use_beam_search"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "400 Grammar error"),
    ],
)
def test_bad_requests_are_refused_in_vllms_words(body: dict[str, Any], said: str) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        assert (await client.refusal(**body)).startswith(said)
        assert (await client.complete())["text"]

    with_client(play, max_model_len=64)


def test_an_answer_ends_where_the_context_does() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        made = await client.complete(prompt=[5] * 60, max_tokens=50, ignore_eos=True)
        assert (len(made["token_ids"]), made["finish_reason"]) == (4, "length")

    with_client(play, max_model_len=64)


def test_routes_keys_and_bodies() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        assert (await client.get("/v1/models"))[0] == 401
        assert await client.get("/health") == (200, "")  # vLLM guards /v1 only
        server.api_key = None
        assert (await client.get("/v1/nothing"))[0] == 404
        assert json.loads((await client.get("/version"))[1])["version"]
        for bad in ("[1]", "{"):
            async with (
                aiohttp.ClientSession() as session,
                session.post(server.url + "/completions", data=bad) as response,
            ):
                assert response.status == 400
        root = server.url.removesuffix("/v1")
        async with aiohttp.ClientSession() as session:
            async with session.post(root + "/tokenize", json={"prompt": "ab"}) as response:
                found = await response.json()
            assert found["tokens"] == TOKENS.encode("ab")
            async with session.post(root + "/detokenize", json={"tokens": found["tokens"]}) as response:
                assert (await response.json())["prompt"] == "ab"

    with_client(play, api_key="k")


def test_a_real_models_tokenizer_can_be_used() -> None:
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token=TURN_END)
    fast.chat_template = CHAT_TEMPLATE
    tokenizer = HubTokenizer(fast)

    async def play(server: FakeServer, client: Client) -> None:
        made = await client.complete(messages=[USER], max_tokens=3)
        expected = fast.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        assert made["all"]["prompt_token_ids"] == expected
        begun = [USER, {"role": "assistant", "content": "red"}]
        going = await client.complete(messages=begun, continue_final_message=True, add_generation_prompt=False)
        assert fast.decode(going["all"]["prompt_token_ids"]).endswith("assistant\nred")
        server.say(" red blue")
        assert (await client.complete(max_tokens=9))["text"] == " red blue"

    with_client(play, tokenizer=tokenizer)


# -- adapters ---------------------------------------------------------------------------------------------------


def test_adapters_come_and_go_as_in_vllm(tmp_path: Path) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        path = write_adapter(tmp_path / "a", 1)
        assert await client.load("a", path) == (200, "Success: LoRA adapter 'a' added successfully.")
        assert server.loaded == {"a": str(path)}
        status, again = await client.load("a", path)
        assert (status, "already been loaded" in again["error"]["message"]) == (400, True)
        assert (await client.load("b", tmp_path / "none"))[0] == 404
        assert (await client.load("b", write_adapter(tmp_path / "big", 1, rank=17)))[0] == 500
        assert (await client.load("", path))[0] == 400
        models = json.loads((await client.get("/v1/models"))[1])["data"]
        assert [(m["id"], m["parent"]) for m in models] == [("fake-model", None), ("a", "fake-model")]
        assert (await client.post("/unload_lora_adapter", {"lora_name": "a"}))[0] == 200
        assert (await client.post("/unload_lora_adapter", {"lora_name": "a"}))[0] == 404
        assert server.loaded == {}

    with_client(play)


async def first_token(client: Client, model: str, **body: Any) -> dict[str, float]:
    made = await client.complete(model=model, max_tokens=1, logprobs=20, seed=1, **body)
    top: dict[str, float] = made["logprobs"]["top_logprobs"][0]
    return top


def test_stale_and_swapped_adapters_show_in_the_numbers(tmp_path: Path) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        path = write_adapter(tmp_path / "a", 1)
        await client.load("a", path)
        await client.load("b", write_adapter(tmp_path / "b", 2))
        right = await first_token(client, "a")
        server.serve_stale("a", like="b")
        assert await first_token(client, "a") == await first_token(client, "b") != right
        server.serve_stale("a", like="fake-model")
        assert await first_token(client, "a") == await first_token(client, "fake-model")
        server.serve_stale("a")
        assert await first_token(client, "a") not in [right, await first_token(client, "fake-model")]
        assert max((await first_token(client, "a")).values()) == max(
            distribution(server.policy("a"), IDS).values()
        )  # what answers can always be recomputed
        server.mend()
        assert await first_token(client, "a") == right
        # loading in place answers with neither the old weights nor the new, but where nothing cached is used
        write_adapter(path, 3)
        assert (await client.load("a", path, load_inplace=True))[0] == 200
        await client.load("new", path)
        new = await first_token(client, "new")
        assert await first_token(client, "a") not in [right, new]
        assert await first_token(client, "a", cache_salt="s") == new
        assert await first_token(client, "a", prompt_logprobs=0) == new

    with_client(play)


def test_as_vllms_cpu_build_it_dies_of_prompts_scored_under_an_adapter_beside_others(tmp_path: Path) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        async def both(first: dict[str, Any], second: dict[str, Any]) -> list[int]:
            asked = [{"prompt": IDS, "max_tokens": 1, **body} for body in (first, second)]
            return [status for status, _ in await asyncio.gather(*(client.post("/completions", a) for a in asked))]

        await client.load("a", write_adapter(tmp_path / "a", 1))
        scored = {"model": "a", "prompt_logprobs": 0}
        assert await both({"model": "a"}, {"prompt_logprobs": 0}) == [200, 200]  # of the base: harmless
        assert (await client.complete(**scored))["prompt_logprobs"]  # alone: harmless
        assert await both({}, scored) == [500, 500]
        assert (await client.get("/health"))[0] == 503
        assert (await client.refusal()).startswith("500")

    with_client(play, cpu_build=True, latency_s=0.05)


def test_an_engine_dies_of_an_adapter_whose_files_are_gone(tmp_path: Path) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        path = write_adapter(tmp_path / "a", 1)
        await client.load("a", path)
        rmtree(path)
        assert (await client.get("/health"))[0] == 200
        assert (await client.refusal(model="a")).startswith("500")
        assert (await client.refusal()).startswith("500")  # all of it
        assert (await client.get("/health"))[0] == 503
        server.kill()
        await server.revive()
        assert (await client.get("/health"))[0] == 200
        assert (await client.refusal(model="a")).startswith("404")  # a restarted server has forgotten it

    with_client(play)


# -- the queue --------------------------------------------------------------------------------------------------


def test_slots_are_shared_out_in_order_of_arrival() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        done: list[int] = []

        async def one(number: int) -> None:
            await client.complete(max_tokens=1, seed=number)
            done.append(number)

        start = now()
        tasks = []
        for number in range(9):
            tasks.append(asyncio.ensure_future(one(number)))
            while server.calls <= number:
                await asyncio.sleep(0.001)
        assert (server.running, server.waiting) == (3, 6)
        await asyncio.gather(*tasks)
        assert 0.3 <= now() - start < 0.4  # three rounds of 0.1 s
        assert [sorted(done[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
        assert (server.most_running, server.running, server.waiting) == (3, 0, 0)
        assert (server.calls, server.answered, server.cancelled) == (9, 9, 0)

    with_client(play, run_hasty, slots=3, latency_s=0.1)


def test_whoever_gives_up_waiting_makes_room() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.hang()
        tasks = [asyncio.ensure_future(client.complete(max_tokens=1, seed=i)) for i in range(6)]
        while server.calls < 6:
            await asyncio.sleep(0.001)
        for task in tasks[:4]:  # one that runs, three that wait
            task.cancel()
        while server.cancelled < 4:
            await asyncio.sleep(0.001)
        server.wake()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True] * 4 + [False] * 2
        while server.running:
            await asyncio.sleep(0.001)
        assert (server.cancelled, server.answered, server.waiting, server.most_running) == (4, 2, 0, 1)

    with_client(play, slots=1)


def test_a_full_queue_refuses() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.hang()
        tasks = [asyncio.ensure_future(client.complete(max_tokens=1)) for _ in range(3)]
        while server.waiting < 2:
            await asyncio.sleep(0.001)
        assert (await client.refusal()).startswith("503 The engine is currently busy")
        server.wake()
        await asyncio.gather(*tasks)
        assert (await client.complete())["text"] is not None

    with_client(play, slots=1, max_waiting=2)


def test_time_is_taken_by_tokens_by_prompts_not_seen_before_and_by_slowness() -> None:
    async def timed(client: Client, **body: Any) -> float:
        start = now()
        await client.complete(ignore_eos=True, **body)
        return now() - start

    async def play(server: FakeServer, client: Client) -> None:
        await client.complete(max_tokens=1)
        own = 3 * 0.002  # less than a block of the prompt: not remembered
        assert await timed(client, max_tokens=10) == pytest.approx(0.1 + own, abs=0.01)
        server.slow(4)
        assert await timed(client, max_tokens=10) == pytest.approx(4 * (0.1 + own), abs=0.01)
        server.slow(1)
        prompt = [5] * 64
        assert await timed(client, max_tokens=1, prompt=[*prompt, 6]) == pytest.approx(0.01 + 65 * 0.002, abs=0.01)
        assert await timed(client, max_tokens=1, prompt=[*prompt, 7]) == pytest.approx(0.01 + 0.002, abs=0.01)
        metrics = (await client.get("/metrics"))[1]
        assert 'vllm:prefix_cache_hits_total{engine="0",model_name="fake-model"} 64.0' in metrics
        salted = await timed(client, max_tokens=1, prompt=[*prompt, 7], cache_salt="s")
        assert salted == pytest.approx(0.01 + 65 * 0.002, abs=0.01)
        again = await timed(client, max_tokens=1, prompt=[*prompt, 7], cache_salt="s")
        assert again == pytest.approx(0.01 + 0.002, abs=0.01)

    with_client(play, run_hasty, per_token_s=0.01, per_prompt_token_s=0.002)


# -- faults -----------------------------------------------------------------------------------------------------


def test_failures_come_in_order_as_often_as_told_and_end_with_mend() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.fail(500, times=2)
        server.fail(503, message="full")
        said = [(await client.refusal())[:8] for _ in range(3)]
        assert said == ["500 Engi", "500 Engi", "503 full"]
        assert (await client.complete())["text"] is not None
        server.fail(500, times=None)
        assert [(await client.refusal())[:3] for _ in range(4)] == ["500"] * 4
        server.mend()
        assert (await client.complete())["text"] is not None
        server.fail(500, where="adapters")
        assert (await client.load("a", Path("/nowhere")))[0] == 500
        assert (await client.load("a", Path("/nowhere")))[0] == 404
        assert server.answered == 2

    with_client(play)


def test_misreported_prompts_and_servers_without_ids() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        server.retokenise()
        assert (await client.complete(max_tokens=1))["prompt_token_ids"] != IDS
        assert (await client.complete(max_tokens=1))["prompt_token_ids"] == IDS
        server.gives_ids = False
        made = await client.complete(max_tokens=1, logprobs=0)
        assert "token_ids" not in made
        assert not made["logprobs"]["tokens"][0].startswith("token_id:")

    with_client(play)


@pytest.mark.parametrize("how", ["hang", "sleep", "pause"])
def test_halts_hold_what_is_under_way_and_only_some_show(how: str) -> None:
    async def play(server: FakeServer, client: Client) -> None:
        task = asyncio.ensure_future(client.complete(max_tokens=5))
        while not server.running:
            await asyncio.sleep(0.001)
        getattr(server, how)()
        await asyncio.sleep(30)
        assert not task.done()
        assert (await client.get("/health"))[0] == 200
        state = [json.loads((await client.get(path))[1]) for path in ("/is_sleeping", "/is_paused")]
        assert state == [{"is_sleeping": how != "hang"}, {"is_paused": how == "pause"}]
        server.wake()
        assert len((await task)["token_ids"]) > 0

    with_client(play, run_hasty, per_token_s=0.02)


def test_death_frees_the_port_and_revival_needs_death() -> None:
    async def play(server: FakeServer, client: Client) -> None:
        url = server.url
        server.kill()
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get("/health")
        await server.revive()
        assert server.url == url
        assert (await client.get("/health"))[0] == 200
        with pytest.raises(EngineError, match="alive"):
            await server.revive()

    with_client(play)


# -- a process of its own ---------------------------------------------------------------------------------------


def test_the_fake_runs_in_a_process_of_its_own_and_survives_sigkill() -> None:
    async def go() -> None:
        async with FakeProcess(seed=4, slots=2, api_key="k") as server, Client(server) as client:
            client._session.headers["Authorization"] = "Bearer k"
            made = await client.complete(seed=1, max_tokens=4)
            async with FakeServer(seed=4) as same, Client(same) as other:
                assert (await other.complete(seed=1, max_tokens=4))["token_ids"] == made["token_ids"]
            await server.command("fail", status=503, times=1)
            assert (await client.refusal()).startswith("503")
            counts = await server.counts()
            assert (counts["calls"], counts["answered"], counts["loaded"]) == (2, 1, {})
            for name, arguments in (("kill", {}), ("fail", {"stat": 1}), ("evict", {"odd": 1})):
                with pytest.raises(EngineError, match=name):
                    await server.command(name, **arguments)
            await server.command("hang")
            waiting = asyncio.ensure_future(client.complete())
            while not (await server.counts())["running"]:
                await asyncio.sleep(0.01)
            url, pid = server.url, server.pid
            server.kill()
            with pytest.raises(aiohttp.ClientError):
                await waiting
            await server.revive()
            assert server.url == url
            assert server.pid != pid
            assert (await server.counts())["calls"] == 0
        with pytest.raises(EngineError, match="not running"):
            _ = server.pid

    run(go())


def test_a_killed_process_can_be_left_and_killed_again() -> None:
    async def go() -> None:
        async with FakeProcess(seed=4) as server:
            server.kill()
            assert server._process is not None
            await server._process.wait()
            server.kill()
        async with FakeProcess(seed=4) as server:
            server.kill()  # and not waited for

    run(go())


def test_a_process_that_cannot_start_says_so() -> None:
    async def go() -> None:
        with pytest.raises(EngineError, match="did not start"):
            await FakeProcess(port=-5).__aenter__()

    run(go())


def test_the_fake_imports_no_torch() -> None:
    code = "import sys, coterie.inference.fake; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
