"""Calls of agents: settings become a request, answers are captured whole, and agents are given what they can take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from pydantic import BaseModel

from coterie.errors import ConfigError, EngineError
from coterie.inference.agent_calls import (
    AgentCalls,
    CapturedCall,
    chat_completion,
    check_settings,
    well_formed,
    wire_request,
)
from coterie.inference.calls import CallRecord
from coterie.inference.fake import FakeServer, distribution
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.pool import ServerPool
from coterie.inference.trust import UnfitServerError
from coterie.inference.wire import FaultKind, ServerFault, WireReply, WireRequest
from coterie.types import AdapterVersion, Tier
from tests.support.loops import run

MESSAGES = [{"role": "user", "content": "Which colour?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


class Colour(BaseModel):
    name: str


def asking(
    play: Callable[[list[FakeServer], AgentCalls], Coroutine[Any, Any, Any]],
    *settings: dict[str, Any],
    **options: Any,
) -> Any:
    """Play with a fake server for each of `settings`, and calls over all of them."""

    async def go() -> Any:
        servers = [FakeServer(**one) for one in settings]
        for server in servers:
            await server.__aenter__()
        control, transport = HttpControl(), HttpTransport()
        fleet = Fleet(ServerPool([s.spec for s in servers], control), control, model="fake-model")
        calls = AgentCalls(fleet, transport, **options)
        try:
            return await play(servers, calls)
        finally:
            await calls.close()
            await fleet.close()
            await transport.close()
            await control.close()
            for server in servers:
                await server.close()

    return run(go())


# -- settings ---------------------------------------------------------------------------------------------------


def test_settings_become_a_request() -> None:
    config = {
        "temperature": 0.5, "max_completion_tokens": 9, "max_tokens": None, "seed": 3, "logit_bias": {"7": 1.5},
        "stop": ["x"], "logprobs": True, "user": "me", "tool_choice": "auto", "extra_body": {"priority": 2},
    }  # fmt: skip
    wire = wire_request(config, MESSAGES)
    assert wire == WireRequest(
        "", messages=tuple(MESSAGES), max_tokens=9, temperature=0.5, seed=3, bias={7: 1.5},
        extra={"priority": 2, "stop": ["x"]},
    )  # fmt: skip
    assert wire_request({}, MESSAGES, max_tokens=33).max_tokens == 33
    assert wire_request({}, MESSAGES).temperature == 1.0
    assert wire_request({"temperature": 0}, MESSAGES).temperature == 0.0


def test_tools_bring_their_settings_and_a_class_becomes_a_schema() -> None:
    wire = wire_request({"tool_choice": "required"}, MESSAGES, tools=[TOOL], response_format=Colour)
    assert wire.extra["tools"] == [TOOL]
    assert wire.extra["tool_choice"] == "required"
    assert wire.extra["response_format"]["json_schema"]["schema"] == Colour.model_json_schema()
    assert wire_request({"response_format": {"type": "json_object"}}, MESSAGES).extra["response_format"] == {
        "type": "json_object"
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"top_p": 0.5}, r"top_p=0\.5.*biased"),
        ({"extra_body": {"min_p": 0.1}}, r"min_p=0\.1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"stream": True}, "stream=True"),
        ({"n": 4}, "n=4"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens='many'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(config, capture=True)


def test_neutral_values_pass_and_without_training_so_do_others() -> None:
    check_settings(
        {"top_p": 1, "presence_penalty": 0.0, "extra_body": {"top_k": -1}, "n": 1, "stream": False}, capture=True
    )
    wire = wire_request({"top_p": 0.5}, MESSAGES, capture=False)
    assert wire.extra == {"top_p": 0.5}
    assert not wire.capture


# -- capture ----------------------------------------------------------------------------------------------------


def test_every_answer_is_captured_with_true_log_probabilities() -> None:
    async def play(servers: list[FakeServer], calls: AgentCalls) -> None:
        wires = [wire_request({"temperature": 0.7, "seed": seed}, MESSAGES, max_tokens=4) for seed in range(6)]
        made = await asyncio.gather(*map(calls.ask, wires))
        assert {call.response_id for call in calls.captured()} == {call.response_id for call in made}
        assert calls.captured() == ()
        for call in made:
            context = list(call.prompt_ids)
            for token, logprob in zip(call.token_ids, call.logprobs, strict=True):
                step = distribution(servers[0].policy(), context, temperature=0.7)
                assert logprob == pytest.approx(step[token], abs=1e-9)
                context.append(token)

    asking(play, {"seed": 1})


def test_no_more_than_wanted_are_kept_and_who_is_called_back_gets_all() -> None:
    async def play(servers: list[FakeServer], calls: AgentCalls) -> list[str]:
        return [(await calls.ask(wire_request({"seed": n}, MESSAGES, max_tokens=1))).response_id for n in range(5)]

    seen: list[CapturedCall] = []
    kept: list[CapturedCall] = []

    async def keeping(servers: list[FakeServer], calls: AgentCalls) -> None:
        made = await play(servers, calls)
        kept.extend(calls.captured())
        assert [call.response_id for call in kept] == made[-2:]

    asking(keeping, {"seed": 1}, keep=2)

    async def telling(servers: list[FakeServer], calls: AgentCalls) -> None:
        assert await play(servers, calls) == [call.response_id for call in seen]
        assert calls.captured() == ()

    asking(telling, {"seed": 1}, on_call=seen.append)


def test_a_full_server_costs_no_answer_and_leaves_a_record() -> None:
    records: list[CallRecord] = []

    class Sink:
        def call(self, record: CallRecord) -> None:
            records.append(record)

    async def play(servers: list[FakeServer], calls: AgentCalls) -> None:
        await calls.ask(wire_request({}, MESSAGES, max_tokens=1))
        records.clear()
        for server in servers:
            server.fail(503, times=1)
        assert (await calls.ask(wire_request({}, MESSAGES, max_tokens=1))).token_ids
        assert [r.outcome for r in records][-1] == "ok"
        assert all(r.outcome == "fallback" for r in records[:-1])
        assert len(records) >= 2
        assert {r.tier for r in records} == {Tier.CAMEL}

    asking(play, {"seed": 1}, {"seed": 1}, calls=Sink())


def test_what_a_server_refuses_is_told_in_its_words_and_not_tried_again() -> None:
    async def play(servers: list[FakeServer], calls: AgentCalls) -> None:
        await calls.ask(wire_request({}, MESSAGES, max_tokens=1))
        before = servers[0].calls
        servers[0].fail(400, times=5, message="no thank you")
        with pytest.raises(ServerFault, match="no thank you") as caught:
            await calls.ask(wire_request({}, MESSAGES, max_tokens=1))
        assert caught.value.kind is FaultKind.REJECTED
        assert servers[0].calls == before + 1
        assert len(calls.captured()) == 1

    asking(play, {"seed": 1})


def test_a_server_whose_answers_cannot_be_trained_on_is_left_for_another() -> None:
    async def play(servers: list[FakeServer], calls: AgentCalls) -> None:
        for _ in range(4):
            call = await calls.ask(wire_request({}, MESSAGES, max_tokens=1))
            assert call.reply.server == servers[1].spec.name

    asking(play, {"seed": 1, "gives_ids": False}, {"seed": 1})

    async def alone(servers: list[FakeServer], calls: AgentCalls) -> None:
        with pytest.raises(UnfitServerError, match="token ids"):
            await calls.ask(wire_request({}, MESSAGES, max_tokens=1))
        assert calls.captured() == ()

    asking(alone, {"seed": 1, "gives_ids": False})

    async def plain(servers: list[FakeServer], calls: AgentCalls) -> None:
        call = await calls.ask(wire_request({}, MESSAGES, max_tokens=1, capture=False))
        assert call.token_ids == ()
        assert call.text

    asking(plain, {"seed": 1, "gives_ids": False})


def test_a_version_that_was_never_published_is_an_error() -> None:
    async def play(servers: list[FakeServer], calls: AgentCalls) -> None:
        with pytest.raises(EngineError, match="never published"):
            await calls.ask(wire_request({}, MESSAGES, max_tokens=1))

    asking(play, {"seed": 1}, adapter=lambda: AdapterVersion("leader", 3))


# -- what the agent is given ------------------------------------------------------------------------------------


def captured(**fields: Any) -> CapturedCall:
    reply = WireReply(
        **{"text": "Blue.", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 2, **fields}
    )
    return CapturedCall("id-1", WireRequest("m", messages=tuple(MESSAGES)), reply, None, 0.0)


def call_of(arguments: str, name: str = "add") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_an_answer_in_openais_form() -> None:
    made = chat_completion(captured())
    assert made["id"] == "id-1"
    assert made["choices"][0]["message"] == {"role": "assistant", "content": "Blue."}
    assert made["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert made["choices"][0]["finish_reason"] == "stop"
    assert chat_completion(captured(finish_reason="repetition"))["choices"][0]["finish_reason"] == "stop"


def test_tool_calls_an_agent_would_crash_on_become_text_but_stay_captured() -> None:
    good, bad = call_of('{"a": 1}'), call_of('"2+3"')
    call = captured(text="", tool_calls=(good, bad), finish_reason="tool_calls")
    message = chat_completion(call)["choices"][0]["message"]
    assert message["tool_calls"] == [good]
    assert "2+3" in message["content"]
    assert call.tool_calls == (good, bad)
    only_bad = chat_completion(captured(text="", tool_calls=(bad,), finish_reason="tool_calls"))["choices"][0]
    assert "tool_calls" not in only_bad["message"]
    assert only_bad["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("call", "fine"),
    [
        (call_of('{"a": 1}'), True),
        (call_of(""), True),
        (call_of("[1]"), False),
        (call_of("{a: 1}"), False),
        (call_of("{}", name=""), False),
        ({}, False),
        ({"function": {"name": "f", "arguments": {"a": 1}}}, False),
    ],
)
def test_well_formed_tool_calls(call: dict[str, Any], fine: bool) -> None:
    assert well_formed(call) is fine
