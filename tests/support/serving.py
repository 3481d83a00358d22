"""Talking to a server of ours in a test: one event loop, one server on a free port, aiohttp's own client.

reply = talk(engine, lambda client: client.post("/v1/completions", prompt="a"))
assert reply.status == 200
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from coterie.serve.app import SERVICE, build_app
from coterie.serve.engine import TokenEngine
from coterie.serve.run import listening
from coterie.serve.service import Service
from coterie.serve.settings import ServeSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """One HTTP answer."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def message(self) -> str:
        """Of an error."""
        return str(self.json["error"]["message"])

    @property
    def choice(self) -> Any:
        """The only choice."""
        assert self.status == 200, self.text
        (choice,) = self.json["choices"]
        return choice

    @property
    def events(self) -> list[Any]:
        """Of a stream; the final [DONE] is checked and left out."""
        assert self.headers["Content-Type"].startswith("text/event-stream")
        *events, last, empty = self.text.split("\n\n")
        assert (last, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Client:
    """Of one server."""

    def __init__(self, session: aiohttp.ClientSession, app: web.Application, port: int) -> None:
        self.session = session
        self.port = port
        self.service: Service = app[SERVICE]

    async def post(self, path: str, **body: Any) -> Reply:
        return await self.send("POST", path, json=body)

    async def get(self, path: str) -> Reply:
        return await self.send("GET", path)

    async def send(self, method: str, path: str, **options: Any) -> Reply:
        async with self.session.request(method, path, **options) as response:
            return Reply(response.status, await response.text(), dict(response.headers))

    async def chat(self, *messages: str, **body: Any) -> Reply:
        """User and assistant in turn."""
        roles = ("user", "assistant")
        said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages or ("Hello",))]
        return await self.post("/v1/chat/completions", **{"messages": said, **body})

    async def complete(self, prompt: Any = "Hello", **body: Any) -> Reply:
        return await self.post("/v1/completions", prompt=prompt, **body)


@asynccontextmanager
async def running(engine: TokenEngine, settings: ServeSettings | None = None) -> AsyncIterator[Client]:
    """A server and a client of it."""
    app = build_app(engine, settings or ServeSettings(model="base"))
    async with (
        listening(app, "127.0.0.1", 0) as (_, port),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        yield Client(session, app, port)


def talk(engine: TokenEngine, work: Callable[[Client], Awaitable[T]], settings: ServeSettings | None = None) -> T:
    """What `work` gives, with a server that lives as long."""

    async def go() -> T:
        async with running(engine, settings) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(go(), 30))


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds, ten seconds at most."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"never happened: {what}")
