"""`coterie serve` as it is used: a process of its own, asked by curl, by our own clients, and stopped by signals."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from coterie.config import BaseConfig
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.local.engine import LocalEngine
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireRequest, server_spec
from coterie.lm.adapters import load_adapter, save_adapter
from coterie.lm.base import BaseModel, load_base
from coterie.types import AdapterVersion, GenerateRequest
from tests.support.scripts import ROOT

NAME = "smollm2-135m-instruct"
A = AdapterVersion("leader", 3)
MAIN = "import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()"


@pytest.fixture(scope="module")
def home(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs: adapters/leader-v3 is there."""
    folder = tmp_path_factory.mktemp("serving")
    base = load_base(BaseConfig(model=str(tiny_path), threads=1, dtype="float32"))
    adapter = base.bank.add("leader", 4, 8.0, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=generator))
    save_adapter(adapter, folder / "adapters" / "leader-v3", base, A)
    return folder


@contextmanager
def server(tiny_path: Path, home: Path, *arguments: object, **environment: str) -> Iterator[tuple[Any, str]]:
    """A running server in float32, as `make_base` has it, and its address; killed at the end where it has not ended by
    itself."""
    command = [sys.executable, "-c", MAIN, "serve", str(tiny_path), "--served-name", NAME, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", *map(str, arguments)],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        assert said[0] == f"loading {tiny_path}\n", process.communicate()
        yield process, re.findall(r"http://\S+(?=/v1)", said[1])[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(tiny_path: Path, home: Path) -> Iterator[str]:
    with server(tiny_path, home, "--adapter-dir", "adapters") as (_, url):
        yield url


def blocks() -> list[str]:
    """The commands of docs/serving.md."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_of_the_page_works_in_its_order(address: str, home: Path) -> None:
    commands = blocks()
    assert len(commands) > 10
    answers: dict[str, Any] = {}
    for command in commands:
        assert "http://localhost:8000/" in command
        shown = command.replace("http://localhost:8000", address).replace("curl ", "curl -w '\\n%{http_code}' ", 1)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shown],
            cwd=home, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        text, _, status = done.stdout.rpartition("\n")
        assert (done.returncode, status) == (0, "200"), f"{command}\n{done.stdout}\n{done.stderr}"
        answers[command] = text
    keys = (
        "/models", "structured_outputs", "json_schema", "tool_choice", '"stream": true', "allowed_token_ids",
        "prompt_logprobs", '"model": "leader-v3"', "/metrics",
    )  # fmt: skip
    by = {key: next(text for command, text in answers.items() if key in command) for key in keys}
    assert json.loads(by["/models"])["data"][0]["id"] == NAME
    said = json.loads(by["structured_outputs"])["choices"][0]["message"]["content"]
    assert said in ("cooperate", "defect")
    trip = json.loads(json.loads(by["json_schema"])["choices"][0]["message"]["content"])
    assert (trip["city"] in ("Oslo", "Rome"), 1 <= trip["days"] <= 20) == (True, True)
    (call,) = json.loads(by["tool_choice"])["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    assert by['"stream": true'].rstrip().endswith("data: [DONE]")
    assert json.loads(by["allowed_token_ids"])["choices"][0]["token_ids"][0] in (50, 60, 70)
    assert json.loads(by["prompt_logprobs"])["choices"][0]["prompt_logprobs"][1]
    assert json.loads(by['"model": "leader-v3"'])["model"] == "leader-v3"
    for name in re.findall(r"`(vllm:\w+)`", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")):
        assert name in by["/metrics"]


# -- our own clients --------------------------------------------------------------------------------------------------


def reaching(url: str, work: Callable[[HttpTransport, HttpControl, ServerSpec], Coroutine[Any, Any, Any]]) -> Any:
    async def go() -> Any:
        transport, control = HttpTransport(), HttpControl()
        try:
            async with asyncio.timeout(120):
                return await work(transport, control, server_spec(url))
        finally:
            await transport.close()
            await control.close()

    return asyncio.run(go())


def test_what_is_served_is_what_the_learner_computes(
    address: str, home: Path, make_base: Callable[..., BaseModel]
) -> None:
    """Token ids there and back, and log-probabilities as the engine inside this process has them."""
    base = make_base()
    base.bank.freeze(A, load_adapter(home / "adapters" / "leader-v3", base))
    engine = LocalEngine(base, cache_tokens=1024)
    prompt, allowed, bias = tuple(range(30, 60)), (20, 40, 60, 80), {40: 1.0, 60: -0.5}

    async def ask(transport: HttpTransport, control: HttpControl, spec: ServerSpec) -> None:
        await control.load_adapter(spec, "leader", str(home / "adapters" / "leader-v3"))
        await control.load_adapter(spec, "leader", str(home / "adapters" / "leader-v3"))
        assert set(await control.models(spec)) >= {NAME, "leader"}
        await control.health(spec)
        for model, adapter in ((NAME, None), ("leader", A)):
            wanted = GenerateRequest(
                prompt, adapter, seed=0, max_tokens=1, temperature=0.7, bias=bias, distribution=True,
                choices=tuple((token,) for token in allowed),
            )  # fmt: skip
            probabilities = (await engine.generate(wanted)).choice_probs
            assert probabilities is not None
            request = WireRequest(
                model, prompt, max_tokens=1, temperature=0.7, allowed=allowed, bias=bias, top=4, seed=3
            )
            reply = await transport.call(spec, request, 30)
            assert reply.prompt_ids == prompt
            assert reply.top_logprobs is not None
            found = {token: math.exp(logprob) for token, logprob in reply.top_logprobs[0].items()}
            assert found == pytest.approx(dict(zip(allowed, probabilities, strict=True)), abs=1e-4)
            free = await transport.call(spec, WireRequest(model, prompt, max_tokens=12, seed=5, temperature=0.8), 30)
            alone = await engine.generate(GenerateRequest(prompt, adapter, seed=5, max_tokens=12, temperature=0.8))
            assert free.token_ids == alone.token_ids
            assert free.logprobs == pytest.approx(alone.logprobs, abs=1e-3)
            # what a prompt is worth, at temperature 1
            plain = await engine.generate(GenerateRequest(prompt, adapter, seed=5, max_tokens=12))
            probe = WireRequest(model, (*prompt, *plain.token_ids), max_tokens=1, extra={"prompt_logprobs": 0})
            scored = (await transport.call(spec, probe, 30)).prompt_logprobs
            assert scored is not None
            assert scored[len(prompt) - 1 :] == pytest.approx(plain.logprobs, abs=1e-3)
        metrics = await control.metrics(spec)
        assert metrics["vllm:num_requests_running"] == 0
        assert metrics["vllm:generation_tokens_total"] > 0
        await control.unload_adapter(spec, "leader")
        await control.unload_adapter(spec, "leader")
        with pytest.raises(ServerFault) as caught:
            await transport.call(spec, WireRequest("leader", prompt), 30)
        assert caught.value.kind is FaultKind.MISSING

    reaching(address, ask)


def test_a_chat_continues_a_prefix_and_comes_in_pieces(address: str) -> None:
    messages = ({"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Answer:"})

    async def ask(transport: HttpTransport, control: HttpControl, spec: ServerSpec) -> None:
        request = WireRequest(NAME, messages=messages, max_tokens=8, seed=1)
        reply = await transport.call(spec, request, 30)
        assert reply.prompt_ids is not None
        assert reply.token_ids is not None
        pieces = [piece async for piece in transport.stream(spec, request, 30)]
        assert "".join(pieces) == reply.text

    reaching(address, ask)


def test_health_is_answered_while_the_engine_works(address: str) -> None:
    async def ask() -> int:
        answered = 0
        async with aiohttp.ClientSession(address) as session:
            bodies = [
                {"prompt": [(7 * n + 13 * i) % 290 for i in range(400)], "max_tokens": 60, "ignore_eos": True}
                for n in range(24)
            ]
            work = [asyncio.ensure_future(session.post("/v1/completions", json=body)) for body in bodies]
            while not any(task.done() for task in work):
                async with session.get("/health") as reply:
                    assert reply.status == 200
                answered += 1
            for task in work:
                answer = await (await task).json()
                assert answer["usage"]["completion_tokens"] == 60
        return answered

    assert asyncio.run(ask()) > 20  # before the first of them ends; an engine that holds the loop answers once or twice


# -- start and end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_work_finish_and_the_process_ends_well(
    tiny_path: Path, home: Path, number: signal.Signals
) -> None:
    async def ask(process: subprocess.Popen[str], url: str) -> Any:
        headers = {"Authorization": "Bearer s3cret"}
        async with aiohttp.ClientSession(url, headers=headers) as session:
            body = {"model": "leader", "prompt": "Hi", "max_tokens": 120, "ignore_eos": True, "stream": True}
            async with session.post("/v1/completions", json=body) as reply:
                await reply.content.readline()
                process.send_signal(number)
                return (await reply.text()).rstrip()

    arguments = ("--adapter", "leader=adapters/leader-v3", "--api-key-env", "SERVE_KEY")
    with server(tiny_path, home, *arguments, SERVE_KEY="s3cret") as (process, url):
        rest = asyncio.run(asyncio.wait_for(ask(process, url), 120))
        assert rest.endswith("data: [DONE]")
        assert '"finish_reason": "length"' in rest
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "stopped"
        assert err == ""
        assert "s3cret" not in out
