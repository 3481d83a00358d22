"""What every transport keeps (`coterie.inference.wire.Transport`), whatever client it is made of.

To hold another transport to it: write a `Subject` and add it to `TRANSPORTS`. The server is the fake, whose
probabilities are recomputed here.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coterie.inference.fake import ByteTokenizer, FakeServer, distribution, write_adapter
from coterie.inference.http import HttpTransport
from coterie.inference.wire import FaultKind, ServerFault, Transport, WireReply, WireRequest, server_spec
from coterie.types import Tier
from tests.support.loops import run

TOKENS = ByteTokenizer()
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which colour?"})
IDS = tuple(TOKENS.chat(MESSAGES, continued=False))


@dataclass(frozen=True)
class Subject:
    """A transport, and what it can carry."""

    make: Callable[[], Transport]
    tier: Tier
    prompt_ids: bool
    """Whether it takes prompts as token ids; if not, as messages."""

    def request(self, **fields: Any) -> WireRequest:
        prompt = {"prompt_ids": IDS} if self.prompt_ids else {"messages": MESSAGES}
        return WireRequest(**{"model": "fake-model", "max_tokens": 4, "seed": 1, **prompt, **fields})


TRANSPORTS = [
    pytest.param(Subject(HttpTransport, Tier.HTTP, prompt_ids=True), id="http"),
    pytest.param(Subject(HttpTransport, Tier.HTTP, prompt_ids=False), id="http-chat"),
]


@pytest.fixture(params=TRANSPORTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.param
    return found


def against(
    subject: Subject, play: Callable[[FakeServer, Transport], Coroutine[Any, Any, Any]], **settings: Any
) -> Any:
    """Play with a fresh server and transport."""

    async def go() -> Any:
        async with FakeServer(**settings) as server:
            transport = subject.make()
            try:
                return await play(server, transport)
            finally:
                await transport.close()

    return run(go())


def ask(subject: Subject, *requests: WireRequest, **settings: Any) -> list[WireReply]:
    async def play(server: FakeServer, transport: Transport) -> list[WireReply]:
        return list(await asyncio.gather(*(transport.call(server.spec, r, 20) for r in requests)))

    found: list[WireReply] = against(subject, play, **settings)
    return found


async def fault(transport: Transport, server: Any, request: WireRequest, timeout_s: float = 20) -> ServerFault:
    with pytest.raises(ServerFault) as caught:
        await transport.call(server, request, timeout_s)
    return caught.value


def test_it_says_which_tier_it_is(subject: Subject) -> None:
    assert subject.make().tier is subject.tier


def test_an_answer_carries_exact_ids_and_log_probabilities(subject: Subject) -> None:
    allowed = tuple(TOKENS.encode("abcdefgh"))
    bias = {allowed[0]: 1.5, allowed[1]: -2.0}
    requests = [
        subject.request(seed=seed, allowed=allowed, bias=bias, temperature=1.4, max_tokens=6) for seed in range(8)
    ]
    policy = FakeServer().policy()
    for reply in ask(subject, *requests):
        assert reply.prompt_ids == IDS
        assert reply.token_ids is not None
        assert reply.logprobs is not None
        assert set(reply.token_ids) <= set(allowed)
        context = list(IDS)
        for token, logprob in zip(reply.token_ids, reply.logprobs, strict=True):
            expected = distribution(policy, context, allowed=allowed, bias=bias, temperature=1.4)
            assert logprob == pytest.approx(expected[token], abs=1e-12)
            context.append(token)
        assert reply.text == TOKENS.decode(reply.token_ids)
        assert (reply.prompt_tokens, reply.completion_tokens) == (len(IDS), 6)
        assert (reply.finish_reason, reply.model) == ("length", "fake-model")
        assert reply.server.startswith("127.0.0.1:")
        assert reply.latency_s > 0


def test_sampling_is_from_the_whole_distribution_even_where_the_server_would_cut_it(subject: Subject) -> None:
    async def play(server: FakeServer, transport: Transport) -> dict[str, Any]:
        await transport.call(server.spec, subject.request(), 20)
        return server.requests[-1]

    body = against(subject, play)
    assert body["top_p"] == 1.0
    assert body["top_k"] in (-1, 0)
    assert body["min_p"] == 0.0
    assert body["repetition_penalty"] == 1.0


def test_a_seed_decides(subject: Subject) -> None:
    first, again, other = ask(subject, *(subject.request(seed=seed, max_tokens=12) for seed in (5, 5, 6)))
    assert first.token_ids == again.token_ids
    assert first.logprobs == again.logprobs
    assert other.token_ids != first.token_ids


def test_the_stop_token_is_part_of_what_was_sampled(subject: Subject) -> None:
    stop = TOKENS.encode("s")[0]
    request = subject.request(max_tokens=50, stop_ids=(stop,), allowed=tuple(TOKENS.encode("rs")))
    (reply,) = ask(subject, request)
    assert reply.token_ids is not None
    assert reply.logprobs is not None
    assert reply.token_ids[-1] == stop
    assert stop not in reply.token_ids[:-1]
    assert len(reply.logprobs) == len(reply.token_ids)
    assert reply.finish_reason == "stop"
    assert "s" not in reply.text


def test_the_likeliest_tokens_come_back_where_asked_for(subject: Subject) -> None:
    allowed = tuple(TOKENS.encode("wxyz"))
    asked, unasked = ask(
        subject, *(subject.request(max_tokens=1, allowed=allowed, top=top, temperature=0.7) for top in (6, 0))
    )
    expected = distribution(FakeServer().policy(), IDS, allowed=allowed, temperature=0.7)
    assert asked.top_logprobs is not None
    assert asked.top_logprobs[0] == pytest.approx(expected, abs=1e-12)
    assert unasked.top_logprobs is None
    assert unasked.token_ids == asked.token_ids


def test_the_sampled_token_is_always_among_the_likeliest(subject: Subject) -> None:
    for reply in ask(subject, *(subject.request(seed=seed, top=2, max_tokens=3) for seed in range(6))):
        assert reply.token_ids is not None
        assert reply.logprobs is not None
        assert reply.top_logprobs is not None
        for token, logprob, top in zip(reply.token_ids, reply.logprobs, reply.top_logprobs, strict=True):
            assert top[token] == logprob
            assert len(top) in (2, 3)


def test_a_begun_answer_is_continued(subject: Subject) -> None:
    begun = (*MESSAGES, {"role": "assistant", "content": "Answer:"})
    prompt = TOKENS.chat(begun, continued=True)
    (reply,) = ask(subject, subject.request(prompt_ids=(), messages=begun, max_tokens=2))
    assert reply.prompt_ids == tuple(prompt)
    assert TOKENS.END not in prompt[-8:]


def test_greedy_takes_the_likeliest(subject: Subject) -> None:
    expected = distribution(FakeServer().policy(), IDS)
    replies = ask(subject, *(subject.request(seed=seed, temperature=0.0, max_tokens=1) for seed in range(4)))
    for reply in replies:
        assert reply.token_ids == (max(expected, key=expected.__getitem__),)
        assert reply.logprobs == pytest.approx((max(expected.values()),), abs=1e-12)


def test_without_capture_the_text_comes_alone(subject: Subject) -> None:
    captured, plain = ask(subject, *(subject.request(capture=capture) for capture in (True, False)))
    assert plain.text == captured.text
    assert plain.token_ids is None
    assert plain.logprobs is None


def test_a_server_that_knows_no_ids_gives_none(subject: Subject) -> None:
    (reply,) = ask(subject, subject.request(), gives_ids=False)
    assert (reply.prompt_ids, reply.token_ids) == (None, None)
    assert reply.text


def test_tool_calls_come_back(subject: Subject) -> None:
    parameters = {"type": "object", "properties": {"post": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "like_post", "parameters": parameters}}
    request = subject.request(
        prompt_ids=(), messages=MESSAGES, max_tokens=200, extra={"tools": [tool], "tool_choice": "required"}
    )
    (reply,) = ask(subject, request)
    (call,) = reply.tool_calls
    assert call["function"]["name"] == "like_post"
    assert "post" in call["function"]["arguments"]
    assert reply.finish_reason == "tool_calls"
    assert reply.token_ids is not None
    assert "like_post" in TOKENS.decode(reply.token_ids)


def test_many_calls_at_once_each_get_their_own_answer(subject: Subject) -> None:
    requests = [subject.request(seed=seed, max_tokens=5) for seed in range(60)]
    together = ask(subject, *requests)
    alone = ask(subject, *reversed(requests[::20]))
    assert [r.token_ids for r in together[::20]] == [r.token_ids for r in reversed(alone)]
    assert len({r.token_ids for r in together}) == 60


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, FaultKind.REJECTED),
        (401, FaultKind.UNAUTHORIZED),
        (403, FaultKind.UNAUTHORIZED),
        (404, FaultKind.MISSING),
        (408, FaultKind.TIMEOUT),
        (413, FaultKind.REJECTED),
        (422, FaultKind.REJECTED),
        (429, FaultKind.OVERLOADED),
        (500, FaultKind.SERVER),
        (502, FaultKind.SERVER),
        (503, FaultKind.OVERLOADED),
        (504, FaultKind.SERVER),
    ],
)
def test_each_error_is_told_by_its_kind_in_the_servers_words_and_never_retried(
    subject: Subject, status: int, kind: FaultKind
) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        server.fail(status, times=None, message="the cat sat on it", retry_after=3)
        found = await fault(transport, server.spec, subject.request())
        assert (found.kind, found.status) == (kind, status)
        assert found.server == server.spec.name
        assert "the cat sat on it" in str(found)
        assert found.retry_after_s == (3.0 if kind is FaultKind.OVERLOADED else 0.0)
        assert server.calls == 1
        server.mend()
        assert (await transport.call(server.spec, subject.request(), 20)).text  # and the next call is served

    against(subject, play)


def test_a_broken_answer_is_no_answer(subject: Subject) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        server.drop()
        assert (await fault(transport, server.spec, subject.request())).kind is FaultKind.CONNECTION
        for body in (b"<html>", b"", b"[]", b'{"choices": []}', b'{"choices": [{"index": 0}]}', b"\xff\xfe{"):
            server.garble(body=body)
            found = await fault(transport, server.spec, subject.request())
            assert found.kind is FaultKind.SERVER, body

    against(subject, play)


def test_a_dead_server_is_a_broken_connection(subject: Subject) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        waiting = asyncio.ensure_future(fault(transport, server.spec, subject.request()))
        server.hang()
        while server.running == 0:
            await asyncio.sleep(0.005)
        server.kill()
        assert (await waiting).kind is FaultKind.CONNECTION  # killed while it was at work
        assert (await fault(transport, server.spec, subject.request())).kind is FaultKind.CONNECTION
        await server.revive()
        assert (await transport.call(server.spec, subject.request(), 20)).text

    against(subject, play)


@pytest.mark.parametrize("how", ["hang", "sleep", "pause"])
def test_a_deadline_is_kept_and_ends_the_work_on_the_server(subject: Subject, how: str) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        await transport.call(server.spec, subject.request(), 20)  # whatever is loaded at the first call
        getattr(server, how)()
        start = time.perf_counter()
        found = await fault(transport, server.spec, subject.request(), timeout_s=0.3)
        assert found.kind is FaultKind.TIMEOUT
        assert time.perf_counter() - start > 0.25
        await until(lambda: server.cancelled == 1)
        assert server.running == 0

    against(subject, play)


def test_cancelling_ends_the_work_on_the_server(subject: Subject) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        server.hang()
        waiting = asyncio.ensure_future(transport.call(server.spec, subject.request(), 20))
        await until(lambda: server.running == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: server.cancelled == 1)
        server.wake()
        assert (await transport.call(server.spec, subject.request(), 20)).text

    against(subject, play)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


def test_the_key_is_sent_and_shown_nowhere(subject: Subject) -> None:
    async def play(server: FakeServer, transport: Transport) -> None:
        assert (await transport.call(server.spec, subject.request(), 20)).text
        found = [
            await fault(transport, server_spec(server.url, key), subject.request()) for key in (None, "opensesame")
        ]
        assert [f.kind for f in found] == [FaultKind.UNAUTHORIZED] * 2
        assert all("api_key_env" in str(f) for f in found)
        server.fail(500, message="bad header Bearer sesame-7 seen")
        found.append(await fault(transport, server.spec, subject.request()))
        server.garble(body=b'{"error": {"message": "sesame-7"}}')
        found.append(await fault(transport, server.spec, subject.request()))
        server.drop()
        found.append(await fault(transport, server.spec, subject.request()))
        server.hang()
        found.append(await fault(transport, server.spec, subject.request(), timeout_s=0.2))
        server.kill()
        found.append(await fault(transport, server.spec, subject.request()))
        for one in found:
            assert not any(key in text for text in shown(one) for key in ("sesame-7", "opensesame"))
        server_says = found[2:4]  # there the raw answer, a local variable, holds it
        for one in [f for f in found if f not in server_says]:
            assert not any(key in text for text in locals_of(one) for key in ("sesame-7", "opensesame"))
        assert "sesame" not in repr(transport) + repr(server.spec)

    against(subject, play, api_key="sesame-7")


def shown(error: BaseException | None) -> list[str]:
    """What an error and those that led to it say of themselves."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error), *map(repr, vars(error).values())]
        error = error.__cause__ or error.__context__
    return texts


def locals_of(error: BaseException) -> list[str]:
    """A traceback with the local variables of its frames, without those of this file, which gave the key."""
    lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return [line for line in lines if "test_transport_contract" not in line]


def test_what_was_asked_is_not_repeated_in_errors(subject: Subject) -> None:
    secret = {"role": "user", "content": "my diary of the year 1987"}
    ids = str(list(IDS))

    async def play(server: FakeServer, transport: Transport) -> None:
        server.fail(400, message=f"cannot read 'my diary of the year 1987' nor {ids}; 'input': {{'x': 1}} either")
        request = subject.request() if subject.prompt_ids else subject.request(messages=(secret,))
        said = str(await fault(transport, server.spec, request))
        assert "cannot read" in said
        assert (ids if subject.prompt_ids else "diary") not in said
        server.fail(400, message="x" * 100_000)
        assert len(str(await fault(transport, server.spec, request))) < 1000

    against(subject, play)


def test_adapters_answer_in_their_own_way_once_they_are_loaded(subject: Subject, tmp_path: Path) -> None:
    request = {"allowed": tuple(TOKENS.encode("abc")), "top": 3, "max_tokens": 1}

    async def play(server: FakeServer, transport: Transport) -> None:
        found = await fault(transport, server.spec, subject.request(model="a@v1"))
        assert found.kind is FaultKind.MISSING
        assert "a@v1" in str(found)
        for name, seed, zero in (("a@v0", 1, True), ("a@v1", 2, False), ("a@v2", 3, False)):
            directory = write_adapter(tmp_path / name, seed, zero=zero)
            await _load(server, name, directory)
        tops = [
            (await transport.call(server.spec, subject.request(model=name, **request), 20)).top_logprobs
            for name in ("fake-model", "a@v0", "a@v1", "a@v2")
        ]
        assert tops[0] == tops[1]  # untrained: the base
        assert len({repr(top) for top in tops}) == 3
        reply = await transport.call(server.spec, subject.request(model="a@v2", **request), 20)
        assert reply.model == "a@v2"

    against(subject, play)


async def _load(server: FakeServer, name: str, directory: Path) -> None:
    from coterie.inference.http import HttpControl

    control = HttpControl()
    await control.load_adapter(server.spec, name, str(directory))
    await control.close()


def test_closing_twice_is_fine_and_a_later_call_in_another_loop_is_served(subject: Subject) -> None:
    transport = subject.make()

    async def once() -> str:
        async with FakeServer() as server:
            reply = await transport.call(server.spec, subject.request(), 20)
            await transport.close()
            await transport.close()
            return reply.text

    assert run(once()) == run(once())
