"""A server from its first line to its last: what it says, what it refuses to start with, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import ConfigError
from coterie.serve.run import address, serve
from coterie.serve.settings import ServeSettings
from tests.support.serving import until
from tests.support.token_engine import MemoryTokenEngine, write_adapter

Work = Callable[[aiohttp.ClientSession], Awaitable[None]]


@pytest.fixture
def engine(tiny_path: Path) -> MemoryTokenEngine:
    return MemoryTokenEngine(AutoTokenizer.from_pretrained(tiny_path))


def life(engine: MemoryTokenEngine, work: Work, **options: Any) -> list[str]:
    """Serve until `work` is done and has sent a signal; what the server said."""
    said: list[str] = []

    async def go() -> None:
        server = asyncio.ensure_future(serve(engine, ServeSettings(model="base"), port=0, say=said.append, **options))
        await until(lambda: bool(said) or server.done(), "the server says where it is")
        if not server.done():
            async with aiohttp.ClientSession(said[0].split()[-1].removesuffix("/v1")) as session:
                await work(session)
        await server

    asyncio.run(asyncio.wait_for(go(), 30))
    return said


def kill(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def ask(session: aiohttp.ClientSession, **body: Any) -> Any:
    return asyncio.ensure_future(session.post("/v1/completions", json={"prompt": "Hi", **body}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_at_once(engine: MemoryTokenEngine, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def work(session: aiohttp.ClientSession) -> None:
        assert (await session.get("/health")).status == 200
        kill(number)

    said = life(engine, work)
    assert said[0].startswith("serving base at http://127.0.0.1:")
    assert said[1:] == ["stopped"]
    assert engine.closed
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_is_finished_and_nothing_new_is_taken(engine: MemoryTokenEngine, stream: bool) -> None:
    engine.delay_s = 0.01
    engine.says("red", end=False)

    async def work(session: aiohttp.ClientSession) -> None:
        await (await session.get("/health")).read()  # a connection that stays open
        running = ask(session, max_tokens=50, stream=stream)
        await until(lambda: engine.running == 1, "one answer under way")
        kill()
        await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as other:
                await other.get(f"{session._base_url}/health")
        text = await (await running).text()
        assert text.count("red") == 50

    said = life(engine, work)
    assert said[1:] == ["stopping: 1 sequences have 30 s to finish; once more ends at once", "stopped"]
    assert engine.cancelled == 0


def test_a_second_signal_ends_at_once(engine: MemoryTokenEngine) -> None:
    engine.delay_s = 0.05
    engine.says("red", end=False)

    async def work(session: aiohttp.ClientSession) -> None:
        running = ask(session, max_tokens=1000)
        await until(lambda: engine.running == 1, "one answer under way")
        kill()
        await asyncio.sleep(0.1)
        assert engine.running == 1
        kill(signal.SIGINT)
        with pytest.raises(aiohttp.ClientError):
            await running

    life(engine, work)
    assert (engine.running, engine.closed) == (0, True)


def test_waiting_has_an_end(engine: MemoryTokenEngine) -> None:
    engine.delay_s = 0.05
    engine.says("red", end=False)

    async def work(session: aiohttp.ClientSession) -> None:
        running = ask(session, max_tokens=1000)
        await until(lambda: engine.running == 1, "one answer under way")
        kill()
        with pytest.raises(aiohttp.ClientError):
            await running

    said = life(engine, work, drain_s=0.2)
    assert said[1] == "stopping: 1 sequences have 0.2 s to finish; once more ends at once"


def test_adapters_of_the_command_line_may_lie_anywhere(engine: MemoryTokenEngine, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", "x")

    async def work(session: aiohttp.ClientSession) -> None:
        reply = await ask(session, model="leader", max_tokens=1)
        assert reply.status == 200
        kill()

    said = life(engine, work, adapters={"leader": path})
    assert said[0].startswith("serving base, leader at ")


def test_an_adapter_that_is_not_there_stops_the_start(engine: MemoryTokenEngine, tmp_path: Path) -> None:
    async def never(session: aiohttp.ClientSession) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"--adapter leader=.*No adapter found"):
        life(engine, never, adapters={"leader": tmp_path / "nothing"})
    assert engine.closed


def test_an_address_that_is_taken_is_an_error(engine: MemoryTokenEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another --port"):
            asyncio.run(serve(engine, ServeSettings(model="base"), port=port, say=lambda line: None))
    assert engine.closed


def test_addresses_are_urls() -> None:
    assert address("127.0.0.1", 80) == "http://127.0.0.1:80/v1"
    assert address("::1", 8000) == "http://[::1]:8000/v1"


# -- mistakes on the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in"),
        (["--vllm-python", "x"], "belong to --backend vllm"),
        (["--vllm-arg=--x"], "belong to --backend vllm"),
        (["--adapter", "leader"], "write it as NAME=DIRECTORY"),
        (["--adapter", "=x"], "write it as NAME=DIRECTORY"),
        (["--adapter", "a=x", "--adapter", "a=y"], "is given twice"),
        (["--adapter-dir", "/nonexistent"], "no such directory; make it first"),
        (["--api-key-env", "COTERIE_NO_SUCH_VARIABLE"], "this environment variable is not set"),
        (["--backend", "vllm", "--vllm-python", "/nonexistent/python"], "no such interpreter"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_no_thread_is_left(engine: MemoryTokenEngine) -> None:
    async def work(session: aiohttp.ClientSession) -> None:
        kill()

    before = set(threading.enumerate())
    life(engine, work)
    assert set(threading.enumerate()) <= before  # others may have ended meanwhile
