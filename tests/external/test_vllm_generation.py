"""A real vLLM answers as the in-process engine does: same prompt ids, same distributions, adapters included."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coterie.inference.client import VLLMClient
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.local.engine import LocalEngine
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher
from coterie.inference.remote import RemoteEngine
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, Transport, WireRequest
from coterie.lm.base import BaseModel
from coterie.types import AdapterVersion, GenerateRequest, Observation, Tier
from tests.external.conftest import SERVED
from tests.external.processes import ServerProcess

CLOSE = 2e-3
"""Largest difference of log-probabilities between vLLM and the in-process engine, both in float32; 1e-5 is usual."""

QUESTION = Observation(system="You answer in one word.", user="Which colour is a ripe banana?", prefix="Answer:")
COLOURS = ("yellow", "blue", "dark green", "dark red", "white")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(300):
            return await work

    return asyncio.run(bounded())


@asynccontextmanager
async def engine_on(server: ServerSpec, transport: Transport, base: BaseModel) -> AsyncIterator[RemoteEngine]:
    """An engine on one server, which publishes adapters there."""
    control = HttpControl()
    pool = ServerPool([server], control)
    publisher = Publisher(pool, control, HttpTransport(), quorum=1.0, canary_tolerance=0.1)
    pool.loader = publisher.load
    fleet = Fleet(pool, control, publisher, model=SERVED, closing=(control.close,))
    engine = RemoteEngine(transport, fleet, timeout_s=240, decode=base.chat.tokenizer.decode, max_top=20)
    try:
        await engine.detect()
        yield engine
    finally:
        await engine.close()


def question(base: BaseModel, adapter: AdapterVersion | None, seed: int = 0, **more: Any) -> GenerateRequest:
    """The question, as ids and as messages."""
    return GenerateRequest(
        prompt_ids=base.chat.render(QUESTION),
        adapter=adapter,
        seed=seed,
        messages=(("system", QUESTION.system), ("user", QUESTION.user), ("assistant", QUESTION.prefix)),
        **more,
    )


def colours(base: BaseModel) -> tuple[tuple[int, ...], ...]:
    return base.chat.encode_choices(QUESTION, COLOURS)


def test_choices_have_the_in_process_engines_probabilities_under_base_and_adapters(
    vllm: ServerProcess, base_model: BaseModel, oracle: LocalEngine, trained: dict[AdapterVersion, Path]
) -> None:
    choices = colours(base_model)
    bias = {choices[1][0]: 0.5}

    async def play() -> None:
        async with engine_on(vllm.spec, HttpTransport(), base_model) as engine:
            answers = []
            for version in (None, *trained):
                if version is not None:
                    await engine.publish(version, trained[version])
                request = question(base_model, version, choices=choices, bias=bias, temperature=0.7, distribution=True)
                found, expected = await engine.generate(request), await oracle.generate(request)
                assert found.choice_probs == pytest.approx(expected.choice_probs, abs=CLOSE)
                assert found.tier is Tier.HTTP
                answers.append(found.choice_probs)
            assert all(max(abs(a - b) for a, b in zip(answers[0], other, strict=True)) > 0.01 for other in answers[1:])

    run(play())


def test_a_seed_draws_the_same_choice_here_and_there(
    vllm: ServerProcess, base_model: BaseModel, oracle: LocalEngine
) -> None:
    requests = [question(base_model, None, seed, choices=colours(base_model), temperature=1.5) for seed in range(12)]

    async def play() -> None:
        async with engine_on(vllm.spec, HttpTransport(), base_model) as engine:
            found = await asyncio.gather(*map(engine.generate, requests))
            expected = [await oracle.generate(request) for request in requests]
            assert [f.choice for f in found] == [e.choice for e in expected]
            assert len({f.choice for f in found}) > 1
            for one, other in zip(found, expected, strict=True):
                assert (one.prompt_ids, one.token_ids, one.allowed) == (
                    other.prompt_ids,
                    other.token_ids,
                    other.allowed,
                )
                assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)
                assert one.entropy == pytest.approx(other.entropy, abs=CLOSE)

    run(play())


def test_greedy_text_and_its_log_probabilities_agree(
    vllm: ServerProcess, base_model: BaseModel, oracle: LocalEngine, trained: dict[AdapterVersion, Path]
) -> None:
    version = next(iter(trained))

    async def play() -> None:
        async with engine_on(vllm.spec, HttpTransport(), base_model) as engine:
            await engine.publish(version, trained[version])
            for adapter in (None, version):
                request = question(
                    base_model, adapter, max_tokens=8, temperature=0.0, stop_ids=base_model.chat.stop_ids
                )
                found, expected = await engine.generate(request), await oracle.generate(request)
                assert found.token_ids == expected.token_ids
                assert found.logprobs == pytest.approx(expected.logprobs, abs=CLOSE)
                assert found.finish_reason == expected.finish_reason

    run(play())


def test_sampled_text_reports_the_distribution_it_was_drawn_from(vllm: ServerProcess, base_model: BaseModel) -> None:
    """Temperature and allowed ids are part of it: the log-probabilities over all allowed ids sum to one."""
    ids = base_model.chat.render(QUESTION)
    allowed = tuple(choice[0] for choice in colours(base_model) if choice)
    allowed = tuple(sorted(set(allowed)))
    request = WireRequest(
        SERVED, prompt_ids=ids, max_tokens=3, temperature=1.3, seed=5, allowed=allowed, top=len(allowed)
    )

    async def play() -> None:
        transport = HttpTransport()
        reply = await transport.call(vllm.spec, request, 240)
        await transport.close()
        assert reply.prompt_ids == ids
        assert set(reply.token_ids or ()) <= set(allowed)
        assert reply.top_logprobs is not None
        for token, logprob, top in zip(reply.token_ids or (), reply.logprobs or (), reply.top_logprobs, strict=True):
            assert set(top) == set(allowed)
            assert top[token] == pytest.approx(logprob, abs=1e-6)
            assert sum(map(math.exp, top.values())) == pytest.approx(1.0, abs=1e-4)

    run(play())


def test_many_seeded_prompts_at_once_do_not_kill_the_server(vllm: ServerProcess, base_model: BaseModel) -> None:
    """The CPU build dies of a seeded request whose prompt is computed in parts, unless it is started as here."""
    ids = base_model.chat.render(QUESTION)
    requests = [
        WireRequest(SERVED, prompt_ids=(*ids, *ids[: number % len(ids)]), max_tokens=1, seed=number)
        for number in range(64)
    ]

    async def play() -> None:
        transport = HttpTransport()
        replies = await asyncio.gather(*(transport.call(vllm.spec, request, 280) for request in requests))
        await transport.close()
        assert [reply.prompt_ids for reply in replies] == [request.prompt_ids for request in requests]

    run(play())
    assert vllm.alive


def test_faults_are_told_in_vllms_own_words(vllm: ServerProcess) -> None:
    async def play() -> None:
        transport, control = HttpTransport(), HttpControl()
        cases = [
            (WireRequest("nobody", prompt_ids=(1, 2)), FaultKind.MISSING, "`nobody` does not exist"),
            (WireRequest(SERVED, prompt_ids=(1,) * 3000), FaultKind.REJECTED, "maximum context length is 2048"),
        ]
        for request, kind, words in cases:
            with pytest.raises(ServerFault, match=words) as caught:
                await transport.call(vllm.spec, request, 60)
            assert caught.value.kind is kind
        with pytest.raises(ServerFault, match="finds no adapter at /nowhere"):
            await control.load_adapter(vllm.spec, "ghost", "/nowhere")
        await transport.close()
        await control.close()

    run(play())


def test_an_adapter_is_loaded_named_used_and_unloaded(
    vllm: ServerProcess, base_model: BaseModel, trained: dict[AdapterVersion, Path]
) -> None:
    directory = next(iter(trained.values()))
    ids = base_model.chat.render(QUESTION)

    async def play() -> None:
        transport, control = HttpTransport(), HttpControl()
        for _ in range(2):  # loading what is loaded is no error
            await control.load_adapter(vllm.spec, "by-hand", str(directory))
        assert {SERVED, "by-hand"} <= set(await control.models(vllm.spec))
        ask = WireRequest("by-hand", prompt_ids=ids, max_tokens=1, extra={"prompt_logprobs": 0})
        reply = await transport.call(vllm.spec, ask, 240)
        assert len(reply.prompt_logprobs or ()) == len(ids) - 1
        for _ in range(2):
            await control.unload_adapter(vllm.spec, "by-hand")
        assert "by-hand" not in await control.models(vllm.spec)
        with pytest.raises(ServerFault) as caught:
            await transport.call(vllm.spec, ask, 60)
        assert caught.value.kind is FaultKind.MISSING
        await control.health(vllm.spec)
        metrics = await control.metrics(vllm.spec)
        assert metrics["vllm:num_requests_running"] == 0
        await transport.close()
        await control.close()

    run(play())


def test_the_client_talks_and_streams(vllm: ServerProcess) -> None:
    async def play() -> None:
        async with VLLMClient(vllm.url, SERVED, tiers=("http",), timeout_s=240) as client:
            assert client.connection_available
            assert client.tier is Tier.HTTP
            whole = await client.generate("Say hello.", max_tokens=8, temperature=0.0, return_tokens=True)
            assert whole.token_ids
            assert whole.server == vllm.spec.name
            pieces = [piece async for piece in client.stream("Say hello.", max_tokens=8, temperature=0.0)]
            assert "".join(pieces) == whole.text

    run(play())
