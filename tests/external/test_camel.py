"""CAMEL agents on our backend, and CAMEL's own models as a tier, with every release of CAMEL that is supported."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from camel.agents import ChatAgent
from camel.models import ModelFactory, StubModel
from camel.toolkits import FunctionTool
from camel.types import ModelPlatformType
from pydantic import BaseModel as Schema

from coterie.errors import ConfigError, EngineError
from coterie.inference.agent_calls import CapturedCall
from coterie.inference.camel import CamelTransport, CoterieModelBackend, CoterieTokenCounter
from coterie.inference.client import VLLMClient
from coterie.inference.counting import ByteCounter, counter_for
from coterie.inference.fake import FakePolicy, FakeServer, distribution, write_adapter
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.local.engine import LocalEngine
from coterie.inference.pool import ServerPool
from coterie.inference.trust import UnfitServerError
from coterie.inference.wire import ServerFault, WireRequest
from coterie.lm.base import BaseModel
from coterie.lm.embedded import resolve_base
from coterie.types import AdapterVersion, Tier
from tests.external.conftest import BASE, SERVED
from tests.external.processes import ServerProcess
from tests.external.test_camel_contract import user_model
from tests.external.test_vllm_generation import CLOSE, COLOURS, engine_on, question

pytestmark = pytest.mark.camel


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAMEL writes logs and summaries of long conversations into the working directory."""
    monkeypatch.chdir(tmp_path)


MESSAGES = ({"role": "system", "content": "You are brief."}, {"role": "user", "content": "Which colour is the sky?"})


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(300):
            return await work

    return asyncio.run(bounded())


def exact(policy: FakePolicy, call: CapturedCall, temperature: float) -> list[float]:
    """The true log-probability of each token of an answer."""
    found, context = [], list(call.prompt_ids)
    for token in call.token_ids:
        found.append(distribution(policy, context, temperature=temperature)[token])
        context.append(token)
    return found


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a (int): The first.
        b (int): The second.

    Returns:
        int: Their sum.
    """
    return a + b


# -- our backend under CAMEL's agents -----------------------------------------------------------------------------


def test_an_agents_answer_is_captured_with_exact_ids_and_log_probabilities() -> None:
    async def play() -> None:
        async with FakeServer(seed=3) as server:
            backend = CoterieModelBackend(
                "fake-model", {"max_completion_tokens": 6, "temperature": 0.8}, servers=server.url
            )
            agent = ChatAgent("You are brief.", model=backend)
            answer = await agent.astep("Which colour is the sky?")
            (call,) = backend.captured()
            assert backend.captured() == ()  # handed over once
            assert answer.info["id"] == call.response_id
            assert call.text.strip() == answer.msgs[0].content.strip()
            assert len(call.token_ids) == 6
            assert [dict(m) for m in call.request.messages] == list(MESSAGES)
            expected = exact(server.policy(), call, 0.8)
            assert call.logprobs == pytest.approx(expected, abs=1e-9)
            assert answer.info["usage"]["prompt_tokens"] == len(call.prompt_ids)
            assert call.adapter is None
            assert call.reply.server == server.spec.name
            await asyncio.to_thread(backend.close)

    run(play())


def test_agents_step_in_plain_code_too_and_remember(coterie_fake: str) -> None:
    backend = CoterieModelBackend("fake-model", {"max_completion_tokens": 4}, servers=coterie_fake, context=2048)
    agent = ChatAgent("You are brief.", model=backend)
    agent.step("One.")
    agent.step("Two.")
    first, second = backend.captured()
    assert [m["role"] for m in first.request.messages] == ["system", "user"]
    assert [m["role"] for m in second.request.messages] == ["system", "user", "assistant", "user"]
    backend.close()


def test_many_agents_at_once_share_several_servers_and_one_that_dies_costs_no_answer() -> None:
    async def play() -> None:
        async with FakeServer(seed=1, latency_s=0.02) as one, FakeServer(seed=1, latency_s=0.02) as other:
            seen: list[CapturedCall] = []
            backend = CoterieModelBackend(
                "fake-model", {"max_completion_tokens": 3}, servers=[one.url, other.url], on_call=seen.append
            )
            agents = [ChatAgent(f"You are number {n}.", model=backend) for n in range(24)]

            async def kill() -> None:
                await asyncio.sleep(0.05)
                one.kill()

            answers, _ = await asyncio.gather(asyncio.gather(*(a.astep("Say something.") for a in agents)), kill())
            assert sorted(a.info["id"] for a in answers) == sorted(call.response_id for call in seen)
            assert len({call.response_id for call in seen}) == len(agents)
            assert backend.captured() == ()  # who is called back gets all of it
            await asyncio.to_thread(backend.close)

    run(play())


def test_tool_calls_run_and_are_captured() -> None:
    async def play() -> None:
        async with FakeServer(seed=1) as server:
            backend = CoterieModelBackend("fake-model", {"max_completion_tokens": 80}, servers=server.url)
            agent = ChatAgent("Use tools.", model=backend, tools=[FunctionTool(add)])
            await backend.arun([{"role": "user", "content": "hi"}])  # the first call also tries the server out
            backend.captured()
            server.say_tool("add", {"a": 2, "b": 3})
            answer = await agent.astep("What is 2 + 3?")
            (record,) = answer.info["tool_calls"]
            assert (record.tool_name, record.args, record.result) == ("add", {"a": 2, "b": 3}, 5)
            asked, told = backend.captured()
            assert asked.tool_calls[0]["function"]["name"] == "add"
            assert asked.request.extra["tools"][0]["function"]["name"] == "add"
            assert told.request.messages[-1]["role"] == "tool"
            await asyncio.to_thread(backend.close)

    run(play())


def test_a_schema_reaches_the_server() -> None:
    class Colour(Schema):
        name: str

    async def play() -> None:
        async with FakeServer(seed=1) as server:
            backend = CoterieModelBackend("fake-model", {"max_completion_tokens": 40}, servers=server.url)
            await backend.arun([{"role": "user", "content": "hi"}])  # the first call also tries the server out
            server.say('{"name": "blue"}')
            answer = await ChatAgent("Be brief.", model=backend).astep("Which colour?", response_format=Colour)
            assert answer.msgs[0].parsed == Colour(name="blue")
            wanted = server.requests[-1]["response_format"]
            assert wanted["json_schema"]["schema"] == Colour.model_json_schema()
            await asyncio.to_thread(backend.close)

    run(play())


def test_on_the_servers_of_a_run_the_version_that_answered_is_known(tmp_path: Path) -> None:
    version = AdapterVersion("leader", 2)

    class Published:
        """What an engine needs of a publisher."""

        async def publish(self, version: AdapterVersion, directory: Path, probe: object) -> None:
            await control.load_adapter(server.spec, self.name(version), str(directory))

        def name(self, version: AdapterVersion) -> str:
            return f"{version.model_id}-{version.version}"

    async def play() -> None:
        pool = ServerPool([server.spec], control)
        fleet = Fleet(pool, control, Published(), model="fake-model", closing=(control.close,))
        directory = tmp_path / "leader"
        write_adapter(directory, seed=5)
        await fleet.publish(version, directory)
        current: list[AdapterVersion | None] = [None, version]
        backend = CoterieModelBackend(
            "any", {"max_completion_tokens": 4}, servers=fleet, adapter=lambda: current.pop(0)
        )
        agent = ChatAgent("Be brief.", model=backend)
        await agent.astep("One.")
        agent.reset()
        await agent.astep("One.")
        base, tuned = backend.captured()
        assert (base.adapter, tuned.adapter) == (None, version)
        assert base.prompt_ids == tuned.prompt_ids
        expected = exact(server.policy("leader-2"), tuned, 1.0)
        assert tuned.logprobs == pytest.approx(expected, abs=1e-9)
        with pytest.raises(EngineError, match="astep"):
            backend.run([{"role": "user", "content": "hi"}])
        await backend.aclose()
        await fleet.close()

    async def everything() -> None:
        nonlocal server, control
        control = HttpControl()
        async with FakeServer(seed=2) as server:
            await play()

    server: FakeServer
    control: HttpControl
    run(everything())


def test_settings_that_would_bias_training_are_refused() -> None:
    cases = [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"extra_body": {"top_k": 20}}, "top_k=20"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"stream": True}, "stream=True"),
        ({"n": 2}, "n=2"),
        ({"max_completion_tokens": 4096}, "leave no room"),
    ]
    for config, words in cases:
        with pytest.raises(ConfigError, match=words):
            CoterieModelBackend("m", config, servers="http://127.0.0.1:1", context=4096)
    CoterieModelBackend("m", {"top_p": 0.9}, servers="http://127.0.0.1:1", capture=False)


def test_a_server_that_gives_no_ids_is_refused_unless_nothing_is_captured() -> None:
    async def play() -> None:
        async with FakeServer(seed=1, gives_ids=False) as server:
            for capture in (True, False):
                backend = CoterieModelBackend(
                    "fake-model", {"max_completion_tokens": 4}, servers=server.url, capture=capture
                )
                agent = ChatAgent("Be brief.", model=backend)
                if capture:
                    with pytest.raises(UnfitServerError, match="no prompt token ids"):
                        await agent.astep("Hi.")
                else:
                    assert (await agent.astep("Hi.")).info["id"]
                await asyncio.to_thread(backend.close)

    run(play())


def test_servers_that_are_gone_are_an_error_of_ours() -> None:
    backend = CoterieModelBackend("m", servers="http://127.0.0.1:9", timeout_s=3)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9"):
        ChatAgent("Be brief.", model=backend).step("Hi.")
    backend.close()


def test_agents_are_made_and_count_tokens_without_network(base_path: Path) -> None:
    """CAMEL's default counter downloads a vocabulary when an agent is made; ours reads the model's own."""
    program = f"""
import socket
def refuse(*a, **k): raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from camel.agents import ChatAgent
from coterie.inference.camel import CoterieModelBackend
backend = CoterieModelBackend("m", servers="http://127.0.0.1:9", tokenizer={str(base_path)!r}, context=2048)
agent = ChatAgent("You are brief.", model=backend)
counter = backend.token_counter
message = {{"role": "user", "content": "Which colour is the sky?"}}
print(counter.count_tokens_from_messages([message]), backend.token_limit)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    count, limit = map(int, done.stdout.split()[-2:])
    counter = counter_for(base_path)
    assert count == counter.count_tokens_from_messages([{"role": "user", "content": "Which colour is the sky?"}])
    assert limit == 2048 - 512 - counter.overhead


def test_a_long_conversation_stays_inside_the_context(coterie_fake: str) -> None:
    backend = CoterieModelBackend("fake-model", {"max_completion_tokens": 8}, servers=coterie_fake, context=700)
    agent = ChatAgent("Be brief.", model=backend)
    for number in range(12):
        agent.step(f"{number}: " + "words and " * 8)
    longest = max(
        backend.token_counter.count_tokens_from_messages(list(c.request.messages)) for c in backend.captured()
    )
    assert longest <= backend.token_limit
    backend.close()


# -- CAMEL's own models -------------------------------------------------------------------------------------------


def test_models_that_cannot_be_used_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"StubModel cannot be asked for token ids.*ModelPlatformType\.VLLM"):
        CamelTransport([StubModel("stub")])


def test_a_users_model_brings_its_server_and_keeps_its_extra_fields() -> None:
    async def play() -> None:
        async with FakeServer(seed=1) as server:
            config = {"temperature": 0.1, "user": "me", "extra_body": {"priority": 3}}
            model = user_model(server.spec, config)
            transport = CamelTransport([model])
            assert [s.url for s in transport.servers] == [server.spec.url]
            await transport.call(transport.servers[0], WireRequest("fake-model", messages=MESSAGES, max_tokens=2), 20)
            sent = server.requests[-1]
            assert (sent["temperature"], sent["user"], sent["priority"]) == (1.0, "me", 3)
            assert model.model_config_dict == config  # it is still theirs
            await transport.close()
            model._client.close()
            await model._async_client.close()

    run(play())


def test_the_client_asks_through_a_users_models_and_leaves_one_whose_server_died() -> None:
    async def play() -> None:
        async with FakeServer(seed=1) as one, FakeServer(seed=1) as two:
            models = [user_model(server.spec) for server in (one, two)]
            async with VLLMClient(model_name="fake-model", camel_models=models, policy="round_robin") as client:
                answers = await asyncio.gather(*(client.generate(f"{n}", 3, seed=n) for n in range(8)))
                assert one.answered > 0 < two.answered
                one.kill()
                assert await asyncio.gather(*(client.generate(f"{n}", 3, seed=n) for n in range(8))) == answers
                assert client.tier is Tier.CAMEL
            for model in models:  # still usable: their owner closes them
                assert not model._async_client.is_closed()
                model._client.close()
                await model._async_client.close()

    run(play())


def test_the_client_asks_a_real_server_through_a_users_model(vllm: ServerProcess) -> None:
    async def play() -> None:
        model = user_model(vllm.spec)
        async with VLLMClient(model_name=SERVED, camel_models=[model], timeout_s=240) as client:
            answer = await client.generate("Say hello.", max_tokens=8, temperature=0.0, return_tokens=True)
            assert (answer.tier, answer.server) == (Tier.CAMEL, vllm.spec.name)
            assert len(answer.token_ids or ()) == len(answer.logprobs or ()) > 0
        model._client.close()
        await model._async_client.close()

    run(play())


def test_prompt_ids_are_refused() -> None:
    async def play() -> None:
        async with FakeServer() as server:
            transport = CamelTransport()
            with pytest.raises(ServerFault, match="CAMEL speaks in messages"):
                await transport.call(server.spec, WireRequest("fake-model", prompt_ids=(1, 2)), 5)
            await transport.close()

    run(play())


def test_the_client_prefers_camel_and_says_so(vllm: ServerProcess) -> None:
    async def play() -> None:
        async with VLLMClient(vllm.url, SERVED, timeout_s=240) as client:
            answer = await client.generate("Say hello.", max_tokens=8, temperature=0.0, return_tokens=True)
            assert (client.tier, answer.tier) == (Tier.CAMEL, Tier.CAMEL)
            assert answer.token_ids

    run(play())


def test_camel_and_http_agree_on_a_real_server(vllm: ServerProcess) -> None:
    request = WireRequest(SERVED, messages=MESSAGES, max_tokens=8, temperature=0.0)

    async def play() -> None:
        model = ModelFactory.create(
            model_platform=ModelPlatformType.VLLM,
            model_type=SERVED,
            url=vllm.url,
            token_counter=CoterieTokenCounter(ByteCounter()),
        )
        replies = []
        for transport in (HttpTransport(), CamelTransport(), CamelTransport([model])):
            replies.append(await transport.call(vllm.spec, request, 240))
            await transport.close()
        for reply in replies[1:]:
            assert (reply.prompt_ids, reply.token_ids, reply.text) == (
                replies[0].prompt_ids, replies[0].token_ids, replies[0].text,
            )  # fmt: skip
            assert reply.logprobs == pytest.approx(replies[0].logprobs, abs=1e-3)
        model._client.close()
        await model._async_client.close()

    run(play())


def test_choices_through_camel_have_the_in_process_engines_probabilities(
    vllm: ServerProcess, base_model: BaseModel, oracle: LocalEngine
) -> None:
    choices = base_model.chat.encode_choices(_question(), COLOURS)
    request = question(base_model, None, choices=choices, distribution=True)

    async def play() -> None:
        async with engine_on(vllm.spec, CamelTransport(), base_model) as engine:
            found, expected = await engine.generate(request), await oracle.generate(request)
            assert found.tier is Tier.CAMEL
            assert found.choice_probs == pytest.approx(expected.choice_probs, abs=CLOSE)

    run(play())


def test_an_agent_on_a_real_server_is_captured_and_its_tools_are_called(vllm: ServerProcess, base_path: Path) -> None:
    async def play() -> None:
        backend = CoterieModelBackend(
            SERVED,
            {"max_completion_tokens": 48, "temperature": 0.0},
            servers=vllm.url,
            tokenizer=base_path,
            context=2048,
            timeout_s=240,
        )
        persona = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        answer = await ChatAgent(persona, model=backend).astep("What is the capital of France?")
        (call,) = backend.captured()
        assert "Paris" in answer.msgs[0].content
        assert len(call.logprobs) == len(call.token_ids) > 0
        counted = backend.token_counter.count_tokens_from_messages(list(call.request.messages))
        assert counted + counter_for(base_path).overhead >= len(call.prompt_ids) >= counted
        decoded = backend.token_counter.decode(list(call.token_ids))
        assert decoded.removesuffix("<|im_end|>").strip() == answer.msgs[0].content.strip()

        agent = ChatAgent("Use the tool.", model=backend, tools=[FunctionTool(add)])
        await agent.astep("What is 2 + 3?")
        calls = backend.captured()
        assert calls
        assert all(c.request.extra["tools"][0]["function"]["name"] == "add" for c in calls)
        await asyncio.to_thread(backend.close)

    run(play())


def test_the_demo_lets_agents_talk_and_shows_what_was_captured(coterie_fake: str, tmp_path: Path) -> None:
    from tests.e2e.test_demo_camel import demo, rows

    done = demo(tmp_path, "--url", coterie_fake, "--tokenizer", resolve_base(BASE))
    assert done.returncode == 0, done.stderr
    agents, client = done.stdout.split("3. CAMEL's own models")
    assert all(cells[:2] == ["camel", "agent"] and cells[-2] == "6" for cells in rows(agents).values())
    assert "in use: camel" in client
    assert all(cells[0] == "camel" for cells in rows(client).values())


def _question() -> Any:
    from tests.external.test_vllm_generation import QUESTION

    return QUESTION


@pytest.fixture
def coterie_fake() -> Any:
    """Url of a fake server in a thread of its own, for code without an event loop."""
    from coterie.inference.loop_thread import LoopThread

    thread = LoopThread("fake")
    server = FakeServer(seed=4)
    thread.run(server.__aenter__())
    yield server.url
    thread.run(server.close())
    thread.close()
