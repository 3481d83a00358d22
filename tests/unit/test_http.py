"""The HTTP tier: bodies, error bodies, pooling, streams and server control. What all transports share is in
`tests/contract/test_transport_contract.py`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from coterie.inference.bodies import body_of, encode, fault_of, path_of, reply_of, retry_after_s
from coterie.inference.fake import ByteTokenizer, FakeServer, token_logprobs, write_adapter
from coterie.inference.http import HttpControl, HttpTransport, prometheus_sums
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireRequest, server_spec
from tests.support.loops import run
from tests.support.virtual import now, run_hasty

IDS = (5, 6, 7, 8)
SPEC = server_spec("http://host:1", api_key="the-key")


def request(**fields: Any) -> WireRequest:
    return WireRequest(**{"model": "fake-model", "prompt_ids": IDS, **fields})


@asynccontextmanager
async def transport(**settings: Any) -> AsyncIterator[HttpTransport]:
    made = HttpTransport(**settings)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def control(**settings: Any) -> AsyncIterator[HttpControl]:
    made = HttpControl(**settings)
    try:
        yield made
    finally:
        await made.close()


class Wire:
    """A server that answers every request with given bytes and keeps what it was sent; for what is hardly HTTP."""

    def __init__(self, *answers: bytes, pause_s: float = 0.0, stay: bool = False) -> None:
        """`answers`: the pieces of each answer. `stay`: keep the connection, silently, after them."""
        self.answers, self.pause_s, self.stay = answers, pause_s, stay
        self.heads: list[bytes] = []
        self.connections = 0
        self.gone = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
                for piece in self.answers:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self.pause_s)
                if self.stay:
                    await reader.read()
                if b"chunked" not in self.answers[0] and b"ontent-" not in self.answers[0]:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone += 1
            writer.close()

    async def __aenter__(self) -> ServerSpec:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return server_spec(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}", api_key="the-key")

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def call(wire: Wire, timeout_s: float = 5.0, asked: WireRequest | None = None, **settings: Any) -> Any:
    """The reply or the fault of one call to such a server."""

    async def go() -> Any:
        async with wire as server, transport(**settings) as sender:
            try:
                return await sender.call(server, asked or request(), timeout_s)
            except ServerFault as fault:
                return fault

    return run(go())


# -- request bodies ---------------------------------------------------------------------------------------------


def test_a_completion_body_is_exactly_what_vllm_takes() -> None:
    full = request(
        max_tokens=3, temperature=0.5, seed=9, stop_ids=(2,), allowed=(4, 5), bias={4: 1.5}, top=2, extra={"n": 1}
    )
    assert path_of(full) == "/completions"
    assert json.loads(encode(body_of(full))) == {
        "model": "fake-model", "prompt": [5, 6, 7, 8], "max_tokens": 3, "temperature": 0.5, "seed": 9,
        "stop_token_ids": [2], "allowed_token_ids": [4, 5], "logit_bias": {"4": 1.5}, "logprobs": 2,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "n": 1,
    }  # fmt: skip


def test_without_capture_only_what_every_server_knows_is_sent() -> None:
    assert json.loads(encode(body_of(request(capture=False)))) == {
        "model": "fake-model", "prompt": [5, 6, 7, 8], "max_tokens": 16, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip


def test_a_chat_body_asks_for_the_answer_or_continues_it() -> None:
    user, begun = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Ans"}
    asked = body_of(request(prompt_ids=(), messages=(user,)))
    assert path_of(request(prompt_ids=(), messages=(user,))) == "/chat/completions"
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 0)
    assert "continue_final_message" not in asked
    continued = body_of(request(prompt_ids=(), messages=(user, begun)), stream=True)
    assert continued["continue_final_message"] is True
    assert continued["add_generation_prompt"] is False
    assert continued["stream"] is True


def test_bodies_are_compact_and_any_mapping_will_do() -> None:
    message = MappingProxyType({"role": "user", "content": "颜色 \ud800"})  # a lone surrogate, as models can write
    raw = encode(body_of(request(prompt_ids=(), messages=(message,), capture=False)))
    assert b": " not in raw
    assert b", " not in raw
    assert json.loads(raw)["messages"] == [dict(message)]


@pytest.mark.parametrize(
    "asked",
    [
        WireRequest("m"),
        request(extra={"x": object()}),
        request(temperature=float("nan")),
        request(bias={1: float("-inf")}),
    ],
)
def test_what_cannot_be_written_is_not_sent(asked: WireRequest) -> None:
    wire = Wire(http(b"{}"))
    fault = call(wire, asked=asked)
    assert fault.kind is FaultKind.REJECTED
    assert "not sent" in str(fault)
    assert wire.heads == []


def test_a_body_of_megabytes_is_sent() -> None:
    async def go() -> None:
        async with FakeServer(max_model_len=10**6) as server, transport() as sender:
            ids = tuple(3 + i % 200 for i in range(400_000))
            reply = await sender.call(server.spec, request(prompt_ids=ids, max_tokens=1), 30)
            assert reply.prompt_ids == ids

    run(go())


# -- answers ----------------------------------------------------------------------------------------------------


def answer(**fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "ab", "finish_reason": "stop", "token_ids": [1, 2], "prompt_token_ids": list(IDS)}
    logprobs = {"tokens": ["token_id:1", "token_id:2"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{}, {}]}
    return {"choices": [{**choice, "logprobs": logprobs, **fields}], "model": "m", "usage": {"prompt_tokens": 4}}


def test_ids_are_read_from_names_where_the_server_gives_no_lists() -> None:
    data = answer()
    del data["choices"][0]["token_ids"]
    assert reply_of(data, request(), "h").token_ids == (1, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [1]},
        {"token_ids": [1, "2"]},
        {"token_ids": [1.0, 2.0]},
        {"text": None},
        {"text": 7},
        {"logprobs": {"tokens": ["token_id:1"], "token_logprobs": [-1.0, -2.0]}},
        {"logprobs": {"tokens": ["token_id:1", "token_id:2"], "token_logprobs": [None, -2.0]}},
        {"logprobs": {"tokens": ["token_id:1", "token_id:2"], "token_logprobs": [float("nan"), -2.0]}},
        {"token_ids": None, "logprobs": {"tokens": ["token_id:1", "token_id:x"], "token_logprobs": [-1.0, -2.0]}},
        {"prompt_logprobs": [None, {"6": {"logprob": -1.0}}]},
        {"prompt_logprobs": [None, {"9": {"logprob": -1.0}}, {"7": {"logprob": -1.0}}, {"8": {"logprob": -1.0}}]},
        {"finish_reason": "abort"},
    ],
)
def test_an_answer_whose_parts_do_not_fit_is_refused(fields: dict[str, Any]) -> None:
    assert reply_of(answer(), request(), "h").logprobs == (-1.0, -2.0)  # the same without the fault is read
    with pytest.raises(ServerFault, match="h: server") as caught:
        reply_of(answer(**fields), request(), "h")
    assert caught.value.kind is FaultKind.SERVER


def test_impossible_tokens_are_not_among_the_likeliest() -> None:
    tops = [{"token_id:1": -1.0, "token_id:9": -9999.0}, {"token_id:2": -2.0, "token_id:3": -0.5}]
    logprobs = {**answer()["choices"][0]["logprobs"], "top_logprobs": tops}
    reply = reply_of(answer(logprobs=logprobs), request(top=2), "h")
    assert reply.top_logprobs == ({1: -1.0}, {2: -2.0, 3: -0.5})


@pytest.mark.parametrize(
    ("chat", "extra"),
    [
        (False, {"prompt_logprobs": 0}),
        (False, {"prompt_logprobs": 3}),
        (False, {"echo": True}),
        (True, {"prompt_logprobs": 0}),
        (True, {"prompt_logprobs": 3}),
    ],
)
def test_the_prompts_log_probabilities_are_the_models_own(chat: bool, extra: Mapping[str, Any]) -> None:
    async def go() -> None:
        async with FakeServer(seed=3) as server, transport() as sender:
            asked = request(temperature=0.5, bias={5: 3.0}, max_tokens=1, extra=extra)
            ids = IDS
            if chat:
                message = {"role": "user", "content": "hi"}
                asked = request(prompt_ids=(), messages=(message,), temperature=0.5, max_tokens=1, extra=extra)
                ids = tuple(ByteTokenizer().chat((message,), continued=False))
            reply = await sender.call(server.spec, asked, 5)
            assert reply.prompt_logprobs == pytest.approx(token_logprobs(server.policy(), ids), abs=1e-12)
            assert len(reply.token_ids or ()) == 1

    run(go())


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}', "too long"),
        (b'{"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}', "too long"),
        (b'{"detail": "too long"}', "too long"),
        (b'{"detail": [{"loc": ["body", "n"], "msg": "not a number", "input": "SECRET"}]}', "body.n: not a number"),
        (b'{"error": "too long"}', "too long"),
        (b'{"message": "too long"}', "too long"),
        (b"too long", "too long"),
        (b'{"error": {"message": "too   long\\n for me"}}', "too long for me"),
        (
            b"{\"error\": {\"message\": \"1 validation error:\\n  {'msg': 'm', 'input': 'SECRET'}\"}}",
            "1 validation error",
        ),
        (b"1 error: 0.Text [type=dict_type, input_value={'a': 'SECRET'}, input_type=dict] at", "input_type=dict"),
        (b"<html><body>nginx SECRET</body></html>", "no message"),
        (b"", "no message"),
        (b"[1]", "no message"),
        (b"[" * 100_000, "[[["),
    ],
)
def test_every_way_servers_word_an_error_is_read(body: bytes, said: str) -> None:
    fault = fault_of(SPEC, 400, {}, body)
    assert fault.kind is FaultKind.REJECTED
    assert said in str(fault)
    assert "SECRET" not in str(fault)
    assert len(str(fault)) < 700


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"error": {"message": "The model `a@v1` does not exist.", "code": 404}}', FaultKind.MISSING),
        (b'{"object": "error", "message": "The model `a@v1` does not exist.", "code": 404}', FaultKind.MISSING),
        (b'{"detail": "Not Found"}', FaultKind.REJECTED),
        (b'{"error": {"message": "Not Found", "type": "Not Found", "code": 404}}', FaultKind.REJECTED),
        (b"404: Not Found", FaultKind.REJECTED),
        (b"<html>", FaultKind.REJECTED),
    ],
)
def test_a_missing_model_is_told_from_a_missing_address(body: bytes, kind: FaultKind) -> None:
    fault = fault_of(SPEC, 404, {}, body)
    assert fault.kind is kind
    assert ("url" in str(fault)) == (kind is FaultKind.REJECTED)


def test_no_part_of_a_message_is_repeated() -> None:
    parts = [{"type": "text", "text": "SECRET ONE"}, {"type": "image_url", "image_url": {}}]
    asked = request(
        prompt_ids=(), messages=({"role": "user", "content": parts}, {"role": "user", "content": "A 'B' C"})
    )
    said = str(fault_of(SPEC, 400, {}, b"cannot read SECRET ONE nor A 'B' C", asked))
    assert said.endswith("cannot read [prompt] nor [prompt]")


NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 0.5 "}, 0.5),
        ({"Retry-After": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        # the server's clock is an hour behind ours: its own Date counts
        ({"Retry-After": "Thu, 01 Jan 2026 11:00:30 GMT", "Date": "Thu, 01 Jan 2026 11:00:00 GMT"}, 30.0),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "inf"}, 0.0),
        ({"Retry-After": "nan"}, 0.0),
        ({"Retry-After": "soon"}, 0.0),
        ({"Retry-After": "Thu, 01 Jan 2026 12:00:30"}, 0.0),
        ({}, 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: Mapping[str, str], seconds: float) -> None:
    assert retry_after_s(headers, NOW) == seconds


def test_retry_after_reaches_the_fault_only_where_it_means_something() -> None:
    assert fault_of(SPEC, 503, {"Retry-After": "4"}, b"").retry_after_s == 4.0
    assert fault_of(SPEC, 400, {"Retry-After": "4"}, b"").retry_after_s == 0.0


def test_an_oversized_error_is_cut_not_read() -> None:
    async def go() -> None:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        head = b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n"
        wire = Wire(head, *([chunk] * 2000))
        async with wire as server, transport() as sender:
            with pytest.raises(ServerFault, match="xxx") as caught:
                await sender.call(server, request(), 10)
            assert caught.value.kind is FaultKind.SERVER

    run(go())


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_answer_is_refused(chunked: bool) -> None:
    body = json.dumps(answer(text="x" * 5000)).encode()
    whole = http(body)
    if chunked:
        whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert call(Wire(whole), max_answer_bytes=10_000).text == "x" * 5000
    fault = call(Wire(whole), max_answer_bytes=4_000)
    assert fault.kind is FaultKind.SERVER
    assert "4000" in str(fault)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", FaultKind.SERVER),
        (b"", FaultKind.CONNECTION),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", FaultKind.CONNECTION),
    ],
)
def test_what_is_not_http_is_a_fault(raw: bytes, kind: FaultKind) -> None:
    class Closing(Wire):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            writer.close()

    assert call(Closing(raw)).kind is kind


def test_a_redirect_is_not_followed_and_the_key_stays_here() -> None:
    other = Wire(http(b"{}"))

    async def go() -> ServerFault:
        async with other as elsewhere:
            wire = Wire(http(b"", "307 Temporary Redirect", f"Location: {elsewhere.url}\r\n"))
            async with wire as server, transport() as sender:
                with pytest.raises(ServerFault) as caught:
                    await sender.call(server, request(), 5)
                assert elsewhere.url in str(caught.value)
                return caught.value

    assert run(go()).kind is FaultKind.REJECTED
    assert other.heads == []


# -- connections ------------------------------------------------------------------------------------------------


def test_the_key_is_sent_only_where_there_is_one_and_no_packed_body_is_asked_for() -> None:
    async def go() -> None:
        wire = Wire(http(json.dumps(answer()).encode()))
        async with wire as server, transport() as sender:
            await sender.call(server, request(), 5)
            await sender.call(server_spec(server.url), request(), 5)
            await sender.call(server_spec(server.url, "from-a-file\n"), request(), 5)
        first, second, third = (head.lower() for head in wire.heads)
        assert b"authorization: bearer the-key\r\n" in first
        assert b"authorization" not in second
        assert b"authorization: bearer from-a-file\r\n" in third
        assert b"accept-encoding: identity\r\n" in first
        assert first.startswith(b"post /v1/completions ")

    run(go())


def test_a_key_that_no_header_can_hold_is_refused_without_showing_it() -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            with pytest.raises(ServerFault, match="key") as caught:
                await sender.call(server_spec(server.url, "one\ntwo"), request(), 5)
            assert caught.value.kind is FaultKind.REJECTED
            assert "one" not in str(caught.value)
            assert server.calls == 0

    run(go())


def test_calls_one_after_the_other_share_a_connection_and_together_they_keep_to_the_limit() -> None:
    async def go() -> None:
        wire = Wire(http(json.dumps(answer()).encode()), pause_s=0.01)
        async with wire as server, transport(connections_per_server=3) as sender:
            for _ in range(5):
                await sender.call(server, request(), 5)
            assert wire.connections == 1
            await asyncio.gather(*(sender.call(server, request(), 5) for _ in range(12)))
            assert wire.connections == 3

    run(go())


def test_the_deadline_covers_waiting_for_a_connection() -> None:
    async def go() -> None:
        async with FakeServer() as server, transport(connections_per_server=1) as sender:
            server.hang()
            first = asyncio.ensure_future(sender.call(server.spec, request(), 5))
            while server.running == 0:
                await asyncio.sleep(0.005)
            with pytest.raises(ServerFault) as caught:
                await sender.call(server.spec, request(), 0.2)
            assert caught.value.kind is FaultKind.TIMEOUT
            assert server.calls == 1
            server.wake()
            assert (await first).text

    run(go())


def test_a_call_after_a_loop_that_was_left_open_is_served() -> None:
    sender = HttpTransport()

    async def once(close: bool) -> None:
        async with FakeServer() as server:
            await sender.call(server.spec, request(), 5)
        if close:
            await sender.close()

    run(once(close=False))
    run(once(close=True))


def test_a_call_from_within_a_cancelled_scope_is_not_taken_for_a_deadline() -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            server.hang()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await sender.call(server.spec, request(), 5)

    run(go())


# -- streams ----------------------------------------------------------------------------------------------------


async def pieces(sender: HttpTransport, server: ServerSpec, asked: WireRequest, timeout_s: float = 5.0) -> list[str]:
    return [piece async for piece in sender.stream(server, asked, timeout_s)]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_is_the_answer_in_pieces(chat: bool) -> None:
    prompt: dict[str, Any] = {"prompt_ids": (), "messages": ({"role": "user", "content": "hi"},)} if chat else {}

    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            server.say("温度 is 5°", times=2)
            asked = request(max_tokens=50, **prompt)
            got = await pieces(sender, server.spec, asked)
            assert "".join(got) == "温度 is 5°" == (await sender.call(server.spec, asked, 5)).text
            assert len(got) == 8  # one for each character, though most take several bytes
            free = request(max_tokens=20, seed=4, allowed=tuple(range(40, 100)), **prompt)
            assert "".join(await pieces(sender, server.spec, free)) == (await sender.call(server.spec, free, 5)).text

    run(go())


def test_pieces_come_as_they_are_made() -> None:
    async def go() -> None:
        async with FakeServer(per_token_s=0.05) as server, transport() as sender:
            stream = sender.stream(server.spec, request(max_tokens=6, allowed=(70, 71)), 5)
            times = [now() async for _ in stream]
            assert [later - sooner for sooner, later in pairwise(times)] == [pytest.approx(0.05, abs=0.02)] * 5

    run(go(), run_hasty)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_a_refused_stream_is_the_same_fault_as_a_refused_call(status: int) -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            server.fail(status, times=None, message="the cat", retry_after=2)
            faults = []
            for work in (pieces(sender, server.spec, request()), sender.call(server.spec, request(), 5)):
                with pytest.raises(ServerFault) as caught:
                    await work
                faults.append(caught.value)
            assert str(faults[0]) == str(faults[1])
            assert faults[0].kind is faults[1].kind
            assert faults[0].retry_after_s == faults[1].retry_after_s

    run(go())


@pytest.mark.parametrize(("status", "kind"), [(500, FaultKind.SERVER), (503, FaultKind.OVERLOADED)])
def test_an_error_in_the_middle_of_a_stream_is_raised(status: int, kind: FaultKind) -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            server.fail(status, message="the engine died", midway=True)
            stream = sender.stream(server.spec, request(allowed=(70, 71)), 5)
            assert [await anext(stream), await anext(stream)] != ["", ""]
            with pytest.raises(ServerFault, match="the engine died") as caught:
                await anext(stream)
            assert caught.value.kind is kind

    run(go())


def test_a_stream_that_breaks_off_is_a_broken_connection() -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            server.drop()
            with pytest.raises(ServerFault) as caught:
                await pieces(sender, server.spec, request())
            assert caught.value.kind is FaultKind.CONNECTION

    run(go())


def stream_answer(*pieces: bytes) -> tuple[bytes, ...]:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return (head, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces))


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


def read_stream(*parts: bytes, ends: bool = True, **settings: Any) -> Any:
    async def go() -> Any:
        wire = Wire(*stream_answer(*parts), *([b"0\r\n\r\n"] if ends else []), pause_s=0.002)
        async with wire as server, transport(**settings) as sender:
            try:
                return await pieces(sender, server, request())
            except ServerFault as fault:
                return fault

    return run(go())


def test_events_may_be_cut_anywhere_and_comments_are_skipped() -> None:
    whole = b": keep-alive\n\n" + event("é1") + event("") + b"event: x\r\n" + event("2") + b"data:[DONE]\n\n"
    assert read_stream(*(whole[i : i + 1] for i in range(len(whole)))) == ["é1", "2"]
    assert read_stream(whole) == ["é1", "2"]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (b"data: nonsense\n\n", FaultKind.SERVER),
        (b'data: {"x": 1}\n\n', FaultKind.SERVER),
        (b"data: []\n\n", FaultKind.SERVER),
        (b'data: {"choices": [{"text": "", "finish_reason": "abort"}]}\n\n', FaultKind.SERVER),
        (b'data: {"error": {"message": "busy", "code": 503}}\n\n', FaultKind.OVERLOADED),
        (b'data: {"error": "odd"}\n\n', FaultKind.SERVER),
        (b"", FaultKind.CONNECTION),
    ],
)
def test_a_stream_that_makes_no_sense_is_a_fault(part: bytes, kind: FaultKind) -> None:
    parts = (event("a"), part) if part else (event("a"),)
    assert read_stream(*parts).kind is kind


def test_a_stream_without_end_is_cut_off() -> None:
    fault = read_stream(*[event("x" * 1000)] * 50, max_answer_bytes=20_000)
    assert fault.kind is FaultKind.SERVER
    assert "20000" in str(fault)


def test_a_streams_deadline_counts_waiting() -> None:
    async def go() -> None:
        async with FakeServer(per_token_s=0.02) as server, transport() as sender:
            stream = sender.stream(server.spec, request(max_tokens=500, allowed=(70, 71)), 0.4)
            assert await anext(stream)
            server.hang()
            with pytest.raises(ServerFault) as caught:
                _ = [piece async for piece in stream]
            assert caught.value.kind is FaultKind.TIMEOUT

    run(go())


def test_a_streams_deadline_never_interrupts_the_caller() -> None:
    async def go() -> None:
        async with FakeServer() as server, transport() as sender:
            got = 0
            async for _ in sender.stream(server.spec, request(max_tokens=1, allowed=(70, 71)), 0.3):
                got += 1
                await asyncio.sleep(0.5)  # longer than the deadline
            assert got == 1

    run(go(), run_hasty)


def test_leaving_a_stream_ends_the_work_on_the_server() -> None:
    async def go() -> None:
        async with FakeServer(per_token_s=0.01) as server, transport() as sender:
            stream = sender.stream(server.spec, request(max_tokens=2000, allowed=(70, 71)), 30)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            async with asyncio.timeout(5):
                while server.running:
                    await asyncio.sleep(0.01)
            assert server.answered == 0

    run(go())


# -- control ----------------------------------------------------------------------------------------------------


def test_adapters_are_loaded_and_unloaded_as_often_as_one_likes(tmp_path: Path) -> None:
    async def go() -> None:
        directory = str(write_adapter(tmp_path / "a", 1))
        async with FakeServer(api_key="k") as server, control() as admin:
            for _ in range(2):
                await admin.load_adapter(server.spec, "a@v1", directory)
                assert await admin.models(server.spec) == ("fake-model", "a@v1")
            for _ in range(2):
                await admin.unload_adapter(server.spec, "a@v1")
                assert await admin.models(server.spec) == ("fake-model",)

    run(go())


def refused(work: Callable[[HttpControl, ServerSpec], Coroutine[Any, Any, Any]], **settings: Any) -> ServerFault:
    async def go() -> ServerFault:
        async with FakeServer(**settings) as server, control() as admin:
            with pytest.raises(ServerFault) as caught:
                await work(admin, server.spec)
            return caught.value

    found: ServerFault = run(go())
    return found


def test_what_cannot_be_loaded_says_why_and_what_to_do(tmp_path: Path) -> None:
    big = str(write_adapter(tmp_path / "big", 1, rank=64))
    missing = refused(lambda admin, server: admin.load_adapter(server, "a", str(tmp_path / "none")))
    assert missing.kind is FaultKind.REJECTED  # not MISSING: there is nothing that could be loaded instead
    assert "paths" in str(missing)
    assert "none" in str(missing)
    too_big = refused(lambda admin, server: admin.load_adapter(server, "a", big))
    assert too_big.kind is FaultKind.SERVER
    assert "rank 64" in str(too_big)
    for work in (
        lambda admin, server: admin.load_adapter(server, "a", big),
        lambda admin, server: admin.unload_adapter(server, "a"),
    ):
        closed = refused(work, adapters=False)
        assert closed.kind is FaultKind.REJECTED
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(closed)


def test_health_is_more_than_an_answer_to_health() -> None:
    async def go() -> None:
        async with FakeServer() as server, control() as admin:
            await admin.health(server.spec)
            for how, word in (("sleep", "asleep"), ("pause", "paused|asleep")):
                getattr(server, how)()
                with pytest.raises(ServerFault, match=word) as caught:
                    await admin.health(server.spec)
                assert caught.value.kind is FaultKind.SERVER
                server.wake()
            server.fail(503, where="health")
            with pytest.raises(ServerFault) as caught:
                await admin.health(server.spec)
            assert caught.value.kind is FaultKind.OVERLOADED
            server.kill()
            with pytest.raises(ServerFault) as caught:
                await admin.health(server.spec)
            assert caught.value.kind is FaultKind.CONNECTION
            await server.revive()
            await admin.health(server.spec)

        async with FakeServer(dev_mode=False) as server, control() as admin:
            server.sleep()
            await admin.health(server.spec)  # it cannot be asked

    run(go())


def test_a_paused_server_is_not_well_even_where_it_is_not_asleep() -> None:
    class Paused(FakeServer):
        async def _is_sleeping(self, request: Any) -> Any:
            from aiohttp import web

            return web.json_response({"is_sleeping": False})

    async def go() -> None:
        async with Paused() as server, control() as admin:
            await admin.health(server.spec)
            server.pause()
            with pytest.raises(ServerFault, match="paused"):
                await admin.health(server.spec)

    run(go())


def test_a_server_without_health_must_list_its_models() -> None:
    async def health_of(wire: Wire) -> None:
        async with wire as server, control() as admin:
            await admin.health(server)

    with pytest.raises(ServerFault):  # 404 everywhere
        run(health_of(Wire(http(b"{}", "404 Not Found"))))

    class Plain(FakeServer):
        async def _handle(self, request: Any) -> Any:
            from aiohttp import web

            return web.Response(status=404) if request.path == "/health" else await super()._handle(request)

    async def plain() -> None:
        async with Plain(dev_mode=False) as server, control() as admin:
            await admin.health(server.spec)

    run(plain())


def test_metrics_are_summed_by_name_and_missing_ones_are_none() -> None:
    text = (
        "# HELP a something\n# TYPE a counter\n"
        'a{x="1",y="} 7 {"} 2\na{x="2"} 3.5 1700000000000\nplain 1e3\nodd NaN\nb{} +Inf\n\nbroken\nworse x\n'
    )
    assert prometheus_sums(text) == {"a": 5.5, "plain": 1000.0, "b": float("inf")}

    async def go() -> None:
        async with FakeServer(slots=1, latency_s=0.2) as server, control() as admin, transport() as sender:
            work = [asyncio.ensure_future(sender.call(server.spec, request(max_tokens=1), 5)) for _ in range(3)]
            while server.waiting < 2:
                await asyncio.sleep(0.005)
            found = await admin.metrics(server.spec)
            assert found["vllm:num_requests_running"] == 1
            assert found["vllm:num_requests_waiting"] == 2
            await asyncio.gather(*work)
            assert (await admin.metrics(server.spec))["vllm:request_success_total"] == 3
        async with Wire(http(b"", "404 Not Found")) as bare, control() as admin:
            assert await admin.metrics(bare) == {}

    run(go())


def test_a_silent_server_is_not_waited_for() -> None:
    async def go() -> None:
        async with (
            Wire(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", stay=True) as server,
            control(timeout_s=0.3) as admin,
        ):
            for work in (admin.health(server), admin.models(server), admin.metrics(server)):
                with pytest.raises(ServerFault) as caught:
                    await work
                assert caught.value.kind is FaultKind.TIMEOUT

    run(go())


def test_the_http_tier_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, coterie.inference.http; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
