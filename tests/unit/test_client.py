"""VLLMClient: alone, on the public fake, and with nothing at all."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

import coterie
from coterie.errors import ConfigError, EngineError
from coterie.inference.client import VLLMClient
from coterie.inference.fake import FakeServer, token_logprobs, write_adapter
from coterie.inference.simulated import LABEL
from coterie.inference.speakers import Ask
from coterie.inference.wire import ServerFault
from coterie.types import Tier
from tests.support.loops import run as go
from tests.support.servers import Records

HTTP = ("http",)


def test_it_is_a_public_name_and_needs_no_torch() -> None:
    assert coterie.VLLMClient is VLLMClient
    code = (
        "import asyncio, sys; from coterie import VLLMClient\n"
        "async def go():\n"
        "    async with VLLMClient(tiers=('http', 'simulated')) as client: print(await client.generate('hi'))\n"
        "asyncio.run(go())\n"
        "print(*(m for m in ('torch', 'transformers', 'camel') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, heavy = done.stdout.splitlines()
    assert text.startswith(LABEL)
    assert heavy == ""
    assert "SIMULATED RESPONSES" in done.stderr  # seen by who sets up no logging, too


def test_a_prompt_becomes_a_chat_and_its_answer_a_text() -> None:
    async def scene() -> None:
        async with FakeServer(model="qwen") as server, VLLMClient(server.url, "qwen", tiers=HTTP) as client:
            server.say("forty-two")
            assert await client.generate("6 * 7 = ?", max_tokens=16, temperature=0.5) == "forty-two"
            body = server.requests[-1]
            assert body["model"] == "qwen"
            assert body["messages"] == [{"role": "user", "content": "6 * 7 = ?"}]
            assert (body["max_tokens"], body["temperature"]) == (16, 0.5)
            assert "return_token_ids" not in body
            assert client.tier is Tier.HTTP
            assert client.connection_available

    go(scene())


def test_chats_adapters_seeds_and_other_fields_reach_the_server(tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeServer() as server, VLLMClient(server.url, tiers=HTTP, seed=5) as client:
            chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
            await client.generate(chat, 4, adapter=None, seed=7, stop=["\n"])
            assert server.requests[-1]["messages"] == chat
            assert (server.requests[-1]["seed"], server.requests[-1]["stop"]) == (7, ["\n"])
            assert server.requests[-1]["model"] == "fake-model"  # the server's own, found out
            with pytest.raises(EngineError, match="does not exist"):
                await client.generate("hi", 4, adapter="mine")
            assert client.tier is Tier.HTTP
            path = write_adapter(tmp_path / "a", seed=1)
            await client._fleet.control.load_adapter(server.spec, "mine", str(path))
            plain, mine = [await client.generate("hi", 40, seed=1, adapter=name) for name in (None, "mine")]
            assert plain != mine
            texts = {await client.generate("hi", 40) for _ in range(5)}
            assert len(texts) == 5  # every call has a seed of its own

    go(scene())


def test_token_ids_and_log_probabilities_on_request() -> None:
    async def scene() -> None:
        async with FakeServer() as server, VLLMClient(server.url, tiers=HTTP) as client:
            answer = await client.generate("hi", 6, 1.0, return_tokens=True)
            assert answer.prompt_ids == tuple(server.tokenizer.chat([{"role": "user", "content": "hi"}], False))
            assert answer.token_ids is not None
            assert answer.logprobs is not None
            exact = token_logprobs(server.policy(), answer.prompt_ids + answer.token_ids)
            assert answer.logprobs == pytest.approx(exact[len(answer.prompt_ids) - 1 :])
            assert (answer.tier, answer.server, answer.simulated) == (Tier.HTTP, server.spec.name, False)
            assert answer.model == "fake-model"
            assert answer.latency_s > 0
        async with FakeServer(gives_ids=False) as server, VLLMClient(server.url, tiers=HTTP) as client:
            assert await client.generate("hi", 6)
            with pytest.raises(EngineError, match="return_token_ids"):
                await client.generate("hi", 6, return_tokens=True)
            assert client.connection_available  # which is no reason to leave the tier

    go(scene())


def test_pieces_of_a_stream_are_the_answer() -> None:
    async def scene() -> None:
        async with FakeServer() as server, VLLMClient(server.url, tiers=HTTP) as client:
            whole = await client.generate("hi", 30, seed=3)
            pieces = [piece async for piece in client.stream("hi", 30, seed=3)]
            assert "".join(pieces) == whole
            assert len(pieces) > 5
            assert all(pieces)

    go(scene())


def test_leaving_a_stream_ends_it_on_the_server() -> None:
    async def scene() -> None:
        async with FakeServer(per_token_s=0.01) as server, VLLMClient(server.url, tiers=HTTP) as client:
            stream = client.stream("hi", 500)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            async with asyncio.timeout(5):
                while server.running:
                    await asyncio.sleep(0.01)
            assert server.cancelled == 1
            assert server.answered == 0

    go(scene())


def test_several_urls_are_one_pool() -> None:
    async def scene() -> None:
        async with FakeServer() as one, FakeServer() as two:
            async with VLLMClient([one.url, two.url], tiers=HTTP, policy="round_robin") as client:
                await asyncio.gather(*(client.generate("hi", 2) for _ in range(20)))
            assert one.answered == two.answered == 10

    go(scene())


def test_bad_input_says_what_is_wrong() -> None:
    for url in ("localhost:8000", "http://me:secret@h"):
        with pytest.raises(ConfigError, match="url"):
            VLLMClient(url)
    with pytest.raises(ConfigError, match="did you mean 'http'"):
        VLLMClient(tiers=("htp",))
    with pytest.raises(ConfigError, match="no tier"):
        VLLMClient(tiers=("http",))
    with pytest.raises(ConfigError, match="last"):
        VLLMClient("http://h", tiers=("simulated", "http"))

    async def scene() -> None:
        async with VLLMClient(tiers=("simulated",)) as client:
            for arguments, said in (
                ((""), "empty"), (([]), "empty"), (("x", 0), "max_tokens"), (("x", 1, -1.0), "temperature"),
                (("x", 1, math.nan), "temperature"),
            ):  # fmt: skip
                given = arguments if isinstance(arguments, tuple) else (arguments,)
                with pytest.raises(EngineError, match=said):
                    await client.generate(*given)  # type: ignore[call-overload]

    go(scene())


def test_a_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with FakeServer(api_key="geheim") as server:
            async with VLLMClient(server.url, tiers=HTTP, api_key="geheim") as client:
                assert await client.generate("hi", 2)
            async with VLLMClient(server.url, tiers=HTTP, api_key="falsch", timeout_s=1.0) as client:
                assert not client.connection_available
                with pytest.raises(EngineError, match="refused the key") as caught:
                    await client.generate("hi", 2)
                assert "falsch" not in str(caught.value)

    with caplog.at_level(logging.DEBUG):
        go(scene())
    assert "geheim" not in caplog.text
    assert "falsch" not in caplog.text


def test_whether_a_server_is_there_is_known_before_anything_is_asked_and_kept_up() -> None:
    async def scene() -> None:
        async with FakeServer() as server:
            client = VLLMClient(server.url, tiers=("http", "simulated"))
            assert client.connection_available
            assert await client.generate("hi", 2)
            server.kill()
            assert (await client.generate("hi", 2)).startswith(LABEL)
            assert not client.connection_available
            assert client.tier is Tier.SIMULATED
            http, simulated = client.status()
            assert (http.up, simulated.in_use) == (False, True)
            assert server.spec.name in http.why
            await server.revive()
            async with asyncio.timeout(10):
                while not client.connection_available:
                    await asyncio.sleep(0.02)
            assert not (await client.generate("hi", 2)).startswith(LABEL)
            await client.close()
        assert not VLLMClient(server.url, tiers=HTTP).connection_available
        assert not VLLMClient(tiers=("simulated",)).connection_available

    go(scene())


def test_the_log_names_the_tier_of_every_call(caplog: pytest.LogCaptureFixture) -> None:
    records = Records()

    async def scene() -> None:
        async with (
            FakeServer() as server,
            VLLMClient(server.url, tiers=("http", "simulated"), calls=records) as client,
        ):
            server.say("first\nline")
            await client.generate("hi", 20)
            server.kill()
            await client.generate("hi", 20)

    with caplog.at_level(logging.INFO):
        go(scene())
    lines = [r.message for r in caplog.records if r.name == "coterie.calls"]
    assert lines[0] == "🤖 HTTP VLLM生成: first line"
    assert lines[-1].startswith("🤖 模拟VLLM生成: [simulated]")
    assert [r.outcome for r in records.kept if r.outcome == "ok"] == ["ok", "ok"]
    assert records.kept[0].completion_tokens == len(b"first\nline") + 1
    said = [r for r in caplog.records if r.name == "coterie.tiers"]
    assert ["SIMULATED" in r.message for r in said] == [False, True]


def test_the_local_tier_answers_in_the_process(tiny_path: Path) -> None:
    async def scene() -> None:
        async with VLLMClient(tiers=("http", "local", "simulated"), base=str(tiny_path)) as client:
            assert client.tier is Tier.LOCAL
            assert not client.connection_available
            chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
            one = await client.generate(chat, 5, 1.0, seed=1, return_tokens=True)
            assert one.token_ids is not None
            assert 1 <= len(one.token_ids) <= 5
            assert one.tier is Tier.LOCAL
            assert one.text == await client.generate(chat, 5, 1.0, seed=1)
            assert "".join([piece async for piece in client.stream(chat, 5, 1.0, seed=1)]) == one.text
            with pytest.raises(EngineError, match="adapter"):
                await client.generate("hi", 2, adapter="x")
            with pytest.raises(EngineError, match="tools"):
                await client.generate("hi", 2, tools=[])
        async with VLLMClient(tiers=("local", "simulated"), base="/no/such/model") as client:
            assert client.tier is Tier.SIMULATED
            assert "/no/such/model" in client.status()[0].why

    go(scene())


def test_special_tokens_in_messages_open_no_message(tiny_path: Path) -> None:
    from coterie.config import BaseConfig
    from coterie.inference.speakers import _render
    from coterie.lm.base import load_base

    tokenizer = load_base(BaseConfig(model=str(tiny_path), threads=1)).chat.tokenizer
    special = tokenizer.all_special_tokens[0]
    nested = special[:2] + special + special[2:]
    plain, evil = (_render(tokenizer, [{"role": "user", "content": f"a{x}b"}]) for x in ("", special + nested))
    assert plain == evil


def test_the_rest_of_an_answer_goes_on_where_it_broke_off() -> None:
    ask = Ask(({"role": "user", "content": "count"},), 10, 1.0, 0)
    assert ask.after([]) is ask
    rest = ask.after(["one", " two"])
    assert rest.messages == (*ask.messages, {"role": "assistant", "content": "one two"})
    assert rest.max_tokens == 8
    again = Ask((*ask.messages, {"role": "assistant", "content": "zero "}), 10, 1.0, 0).after(["one"])
    assert again.messages[-1] == {"role": "assistant", "content": "zero one"}


def test_a_client_serves_one_event_loop_after_the_other() -> None:
    client = VLLMClient(tiers=("simulated",))
    assert all(go(client.generate("hi")).startswith(LABEL) for _ in range(2))
    go(client.close())
    go(client.close())


def test_a_refused_request_tells_the_servers_own_words() -> None:
    async def scene() -> None:
        async with FakeServer() as server, VLLMClient(server.url, tiers=("http", "simulated")) as client:
            with pytest.raises(ServerFault, match="maximum context length"):
                await client.generate("x" * 5000, 5)
            assert server.calls == 1
            assert client.tier is Tier.HTTP

    go(scene())
