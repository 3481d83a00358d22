"""Who is let in, how much at once, what is refused and in which words; and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from transformers import AutoTokenizer

from coterie.errors import EngineError
from coterie.serve.settings import ServeSettings
from tests.support.serving import Client, Reply, running, talk, until
from tests.support.token_engine import MemoryTokenEngine

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "wait"}}


@pytest.fixture
def engine(tiny_path: Path) -> MemoryTokenEngine:
    return MemoryTokenEngine(AutoTokenizer.from_pretrained(tiny_path))


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(reply: Reply, status: int = 400, kind: str = "BadRequestError") -> Any:
    """The error, checked to have vLLM's shape."""
    assert reply.status == status, reply.text
    error = reply.json["error"]
    assert reply.json == {"error": error}
    assert error["code"] == status
    assert error["type"] == kind
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"prompt": ""}, "non-empty", None),
        ({"prompt": []}, "non-empty", None),
        ({"prompt": [""]}, "non-empty", None),
        ({"prompt": [[]]}, "non-empty", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": [-1]}, "greater than or equal to 0", None),
        ({"prompt": [10**6]}, "out-of-vocab", "prompt"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0.", "max_tokens"),
        ({"max_tokens": 5000}, "maximum context length is 2048 tokens", "prompt"),
        ({"max_tokens": "many"}, "max_tokens", "max_tokens"),
        ({"temperature": -1}, "greater than or equal to 0", "temperature"),
        ({"temperature": "NaN"}, "finite", "temperature"),
        ({"top_p": 0}, "greater than 0", "top_p"),
        ({"n": 0}, "greater than or equal to 1", "n"),
        ({"n": 65}, "n must be at most 64, got 65.", "n"),
        ({"logprobs": 21}, "Requested sample logprobs of 21, which is greater than max allowed: 20", "logprobs"),
        ({"logprobs": -1}, "greater than max allowed: 20", "logprobs"),
        ({"prompt_logprobs": 21}, "Requested prompt logprobs of 21", "prompt_logprobs"),
        ({"cache_salt": ""}, "at least 1 character", None),
        ({"cache_salt": "a" * 129}, "at most 128 characters", None),
        ({"cache_salt": "a/b"}, "cache_salt", None),
        ({"prompt_logprobs": 1, "stream": True}, "not available when `stream=True`", None),
        ({"stop": ""}, "stop cannot contain an empty string", None),
        ({"stop": ["a"] * 65}, "at most 64", None),
        ({"stop_token_ids": [10**6]}, "out-of-vocab", "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!", None),
        ({"allowed_token_ids": [10**6]}, "out-of-vocab", "allowed_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "out-of-vocab", "logit_bias"),
        ({"logit_bias": {"red": 1}}, "logit_bias", None),
        ({"logit_bias": {"20": float("nan")}}, "finite", None),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be less than or equal to max_tokens=8, got 9", None),
        ({"seed": 2**63}, "less than", "seed"),
        ({"stream_options": {"include_usage": True}}, "only be defined when `stream=True`", None),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "only use one kind", None),
        ({"structured_outputs": {"choice": []}}, "must not be empty", None),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "only use one kind", None),
        ({"structured_outputs": {"json": {"type": "strong"}}}, "Invalid type", "structured_outputs"),
        ({"allowed_token_ids": [5], "guided_choice": ["a"]}, "cannot be used together", None),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "`use_beam_search` is not supported", None),
        ({"repetition_penalty": 1.3}, "`repetition_penalty` is not supported", None),
        ({"bad_words": ["a"]}, "`bad_words` is not supported", None),
        ({"prompt": ["a"] * 1025}, "exceeds the maximum allowed count of 1024", "prompt"),
        ({"logit_bias": {"20": -100}, "allowed_token_ids": [20]}, None, None),  # one allowed token stays allowed
    ],
)
def test_a_wrong_completion_is_refused_with_its_reason(
    engine: MemoryTokenEngine, body: dict[str, Any], said: str | None, param: str | None
) -> None:
    reply = talk(engine, lambda client: client.post("/v1/completions", **{"prompt": "Hi", **body}))
    if said is None:
        assert reply.status == 200
        return
    error = refused(reply)
    assert said in error["message"]
    if param is not None:
        assert error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "maximum context length"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "`logprobs` must be set to true"),
        ({"tools": []}, "`tools` must not be an empty array"),
        ({"tool_choice": "auto"}, "`tools` must be set"),
        ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "go"}}}, "does not match any"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_choice": ["a"]}, "not both"),
        ({"tools": [TOOL], "allowed_token_ids": [5]}, "cannot be used together"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_schema"}}, "'json_schema' field must be provided"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "Cannot set both"),
        ({"chat_template": "{{ x }}"}, "`chat_template` is not supported"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template is not for requests"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is not for requests"),
    ],
)
def test_a_wrong_chat_is_refused_with_its_reason(engine: MemoryTokenEngine, body: dict[str, Any], said: str) -> None:
    reply = talk(engine, lambda client: client.post("/v1/chat/completions", **{"messages": HELLO, **body}))
    assert said in refused(reply)["message"]
    assert engine.requests == []


def test_what_was_sent_is_not_said_back(engine: MemoryTokenEngine) -> None:
    for body in ({"n": "secret"}, {"prompt": {"a": "secret"}}, {"stop": ["secret"] * 65}):
        reply = talk(engine, lambda client, b=body: client.post("/v1/completions", **{"prompt": "Hi", **b}))  # type: ignore[misc]
        assert "secret" not in refused(reply)["message"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": b"{"}, "not valid JSON"),
        ({"data": b"[" * 100_000}, "not valid JSON"),
        ({"data": b"\xff"}, "not valid JSON"),
        ({"data": b"3"}, "Input should be"),
        (
            {"data": b'{"prompt": "Hi"}', "headers": {"Content-Type": "text/plain"}},
            "Only 'application/json' is allowed",
        ),
    ],
)
def test_only_json_is_read(engine: MemoryTokenEngine, options: dict[str, Any], said: str) -> None:
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    reply = talk(engine, lambda client: client.send("POST", "/v1/completions", headers=headers, **options))
    assert said in refused(reply)["message"]


def test_what_is_nested_too_deeply_is_refused(engine: MemoryTokenEngine) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(150):
        schema = {"type": "object", "properties": {"a": schema}}
    reply = talk(engine, lambda client: client.complete(guided_json=schema))
    assert "recursion limit" in refused(reply)["message"]
    deep = '{"prompt": "x", "guided_json": ' + '{"a":' * 800 + "1" + "}" * 801
    headers = {"Content-Type": "application/json"}
    refused(talk(engine, lambda client: client.send("POST", "/v1/completions", data=deep.encode(), headers=headers)))


def test_unknown_models_and_routes_are_missing(engine: MemoryTokenEngine) -> None:
    async def ask(client: Client) -> tuple[Reply, ...]:
        return (
            await client.complete(model="other"),
            await client.chat(model="other", stream=True),
            await client.get("/v1/nothing"),
            await client.get("/v1/completions"),
            await client.post("/tokenize", model="other", prompt="x"),
        )

    completion, chat, route, method, tokens = talk(engine, ask)
    for reply in (completion, chat, tokens):
        error = refused(reply, 404, "NotFoundError")
        assert error["message"] == "The model `other` does not exist. Valid aliases: base."
        assert error["param"] == "model"
    refused(route, 404, "Not Found")
    refused(method, 405, "Method Not Allowed")
    assert method.headers["Allow"] == "POST"


def test_a_body_has_a_largest_size(engine: MemoryTokenEngine) -> None:
    settings = ServeSettings(model="base", max_body_bytes=2000)
    reply = talk(engine, lambda client: client.complete("x" * 3000), settings)
    refused(reply, 413, "Request Entity Too Large")
    assert talk(engine, lambda client: client.complete("x" * 300), settings).status == 200


def test_prompts_can_be_cut_to_fit(engine: MemoryTokenEngine) -> None:
    ids = list(range(20, 60))
    for keep, wanted in ((7, ids[-7:]), (-1, ids)):
        reply = talk(
            engine,
            lambda client, k=keep: client.complete(ids, truncate_prompt_tokens=k, return_token_ids=True),  # type: ignore[misc]
        )
        assert reply.choice["prompt_token_ids"] == wanted


def test_limits_of_the_server_are_told(engine: MemoryTokenEngine) -> None:
    settings = ServeSettings(model="base", max_tokens=5, max_n=2, max_model_len=100, max_logprobs=3)

    async def ask(client: Client) -> list[Reply]:
        bodies: tuple[dict[str, Any], ...] = ({"max_tokens": 6}, {"n": 3}, {"max_tokens": 99}, {"logprobs": 4})
        return [await client.complete(**body) for body in bodies]

    said = [refused(reply)["message"] for reply in talk(engine, ask, settings)]
    assert said[0] == "max_tokens must be at most 5, got 6."
    assert said[1] == "n must be at most 2, got 3."
    assert "max_tokens must be at most 5" in said[2]
    assert "max allowed: 3" in said[3]


# -- keys -------------------------------------------------------------------------------------------------------------


def test_nobody_comes_in_without_the_key(engine: MemoryTokenEngine) -> None:
    settings = ServeSettings(model="base", api_key="s3cret")
    assert "s3cret" not in repr(settings)

    async def ask(client: Client) -> None:
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert (await client.get(path)).status == 200
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/tokenize", "/detokenize")
        for given in (None, "Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cret2"):
            headers = {} if given is None else {"Authorization": given}
            for path in paths:
                reply = await client.send("POST", path, json={"prompt": "x"}, headers=headers)
                assert (reply.status, reply.json) == (401, {"error": "Unauthorized"})
            assert (await client.send("GET", "/v1/models", headers=headers)).status == 401
        for scheme in ("Bearer", "bearer"):
            right = {"Authorization": f"{scheme} s3cret"}
            assert (await client.send("POST", "/v1/completions", json={"prompt": "x"}, headers=right)).status == 200
            assert (await client.send("GET", "/v1/models", headers=right)).status == 200

    talk(engine, ask, settings)


# -- load -------------------------------------------------------------------------------------------------------------


def test_a_full_server_says_when_to_come_back(engine: MemoryTokenEngine) -> None:
    engine.delay_s = 0.02
    engine.says("a", end=False)

    async def ask(client: Client) -> None:
        first = asyncio.ensure_future(client.complete(n=3, max_tokens=40))
        await until(lambda: engine.running == 3, "three answers at once")
        full = await client.complete(n=2)
        error = refused(full, 503, "Service Unavailable")
        assert error["message"].startswith("The engine is currently busy and cannot accept new requests.")
        assert full.headers["Retry-After"] == "1"
        refused(await client.chat(n=2, stream=True), 503, "Service Unavailable")
        assert (await client.complete(max_tokens=1)).status == 200  # one more fits
        assert (await client.get("/health")).status == 200
        assert (await first).status == 200
        assert (await client.complete(n=6, max_tokens=1)).status == 200  # more than fits, but nobody else is here
        assert client.service.sequences == 0

    talk(engine, ask, ServeSettings(model="base", max_sequences=4))


def test_a_server_on_its_way_out_takes_nothing_new(engine: MemoryTokenEngine) -> None:
    async def ask(client: Client) -> None:
        client.service.draining = True
        for reply in (await client.complete(), await client.get("/health")):
            refused(reply, 503, "Service Unavailable")
            assert reply.headers["Retry-After"] == "10"
        assert (await client.get("/version")).status == 200

    talk(engine, ask)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(engine: MemoryTokenEngine, stream: bool) -> None:
    engine.delay_s = 0.005
    engine.says("a", end=False)

    async def ask() -> None:
        async with running(engine) as client:
            # a connection of its own, closed in mid-answer
            async with aiohttp.ClientSession(f"http://127.0.0.1:{client.port}") as leaver:
                body = {"prompt": "x", "max_tokens": 1500, "n": 2, "stream": stream}
                asked = asyncio.ensure_future(leaver.post("/v1/completions", json=body))
                await until(lambda: engine.running == 2, "two answers under way")
                if stream:
                    response = await asked
                    assert (await response.content.readline()).startswith(b"data: ")
                    response.close()
                else:
                    asked.cancel()
                    await asyncio.gather(asked, return_exceptions=True)
            await until(lambda: engine.running == 0, "the answers ended")
            assert engine.cancelled == 2
            await until(lambda: client.service.sequences == 0, "their places are free")
            assert (await client.complete(max_tokens=1)).status == 200

    asyncio.run(asyncio.wait_for(ask(), 30))


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_engine_is_the_servers_fault(engine: MemoryTokenEngine, caplog: pytest.LogCaptureFixture) -> None:
    async def ask(client: Client) -> list[Reply]:
        engine.broken = EngineError("the cache is gone")
        known = [await client.complete(), await client.complete(n=3, prompt_logprobs=0)]
        engine.broken = RuntimeError("secret internals")
        return [*known, await client.chat()]

    with caplog.at_level(logging.ERROR):
        replies = talk(engine, ask)
    said = [refused(reply, 500, "InternalServerError")["message"] for reply in replies]
    assert said == ["the cache is gone", "the cache is gone", "Internal server error"]
    assert "secret internals" in caplog.text  # for the one who runs it


def test_a_stream_that_fails_says_so_and_ends(engine: MemoryTokenEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.broken = EngineError("the cache is gone")
    for reply in (
        talk(engine, lambda client: client.complete(stream=True)),
        talk(engine, lambda client: client.chat(stream=True)),
    ):
        assert reply.status == 200
        *_, last = reply.events
        assert last["error"]["message"] == "the cache is gone"
        assert last["error"]["code"] == 500


def test_constraints_that_contradict_each_other_are_the_requests_fault(engine: MemoryTokenEngine) -> None:
    ends = [engine.stop_ids[0], 20]
    body: dict[str, Any] = {"allowed_token_ids": ends, "stop_token_ids": [20], "min_tokens": 2}
    error = refused(talk(engine, lambda client: client.complete(**body)))
    assert "no token is allowed here" in error["message"]
    (event,) = talk(engine, lambda client: client.complete(stream=True, **body)).events
    assert event == {"error": error}
    # where a constraint leaves a single token it is taken, also against a bias, as the engine promises
    assert talk(engine, lambda client: client.complete(guided_regex="a", min_tokens=3)).choice["text"] == "a"


def test_bodies_are_plain_json(engine: MemoryTokenEngine) -> None:
    text = talk(engine, lambda client: client.complete(temperature=0, logprobs=5, top_k=1)).text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
