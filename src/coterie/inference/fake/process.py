"""The fake in a process of its own, commanded over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from coterie.errors import EngineError
from coterie.inference.fake.requests import RefusedError, read_json
from coterie.inference.fake.server import FakeServer
from coterie.inference.wire import ServerSpec, server_spec

COMMANDS = (
    "fail", "drop", "garble", "retokenise", "mend", "hang", "sleep", "pause", "wake", "slow", "evict", "serve_stale",
    "say", "say_tool",
)  # fmt: skip
"""Methods of `FakeServer` that can be called from another process."""

_START_S = 30.0


class CommandServer(FakeServer):
    """A fake that takes `COMMANDS` at `POST /fake/<command>` and tells its counts at `GET /fake/counts`."""

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/fake/counts":
            names = ("calls", "answered", "cancelled", "running", "most_running", "waiting")
            counts = {name: getattr(self, name) for name in names}
            return web.json_response({**counts, "loaded": dict(self.loaded)})
        command = request.path.removeprefix("/fake/")
        if command not in COMMANDS:
            return await super()._handle(request)
        try:
            getattr(self, command)(**await read_json(request))
        except (RefusedError, TypeError, KeyError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return web.json_response({})


class FakeProcess:
    """``async with FakeProcess(slots=8, latency_s=0.01) as server``: a `FakeServer` in a process of its own.

    Keyword arguments are those of `FakeServer` that the command line has (see ``python -m coterie.inference.fake -h``).
    """

    def __init__(self, *, api_key: str | None = None, **settings: Any) -> None:
        self._settings = dict(settings)
        self._api_key = api_key
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    @property
    def spec(self) -> ServerSpec:
        """What a transport is given to reach it, key included."""
        return server_spec(self.url, self._api_key)

    @property
    def pid(self) -> int:
        """Of the process, while it is alive."""
        if self._process is None:
            raise EngineError("the fake server's process is not running; enter `async with` or call revive()")
        return self._process.pid

    async def __aenter__(self) -> FakeProcess:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            if self._process.returncode is None:  # a test may have killed it
                self._process.terminate()
            await self._process.wait()
            self._process = None

    async def command(self, name: str, **arguments: Any) -> None:
        """Call a method of the server, one of `COMMANDS`. Raises `EngineError` when it refuses."""
        await self._ask("POST", f"/fake/{name}", arguments)

    async def counts(self) -> Mapping[str, Any]:
        """calls, answered, cancelled, running, most_running, waiting, loaded."""
        return await self._ask("GET", "/fake/counts", None)

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended already."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def revive(self) -> None:
        """Start it again at the same port, as new."""
        if self._process is not None:
            await self._process.wait()
        self._settings["port"] = int(self.url.rsplit(":", 1)[1].split("/")[0])
        await self._start()

    async def _start(self) -> None:
        options = []
        for name, value in self._settings.items():
            if value is not None:
                options += [f"--{name.replace('_', '-')}", str(value)]
        environment = dict(os.environ)
        if self._api_key is not None:  # not on the command line, which every user of the machine can read
            environment["COTERIE_FAKE_KEY"] = self._api_key
            options += ["--api-key-env", "COTERIE_FAKE_KEY"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "coterie.inference.fake", "--commands", *options,
            stdout=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_S)
        except TimeoutError:
            line = b""
        if not line:
            if process.returncode is None:
                process.kill()
            code = await process.wait()
            raise EngineError(f"the fake server did not start (exit code {code}); what it wrote to stderr says why")
        self._process = process
        self.url = json.loads(line)["url"]

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        url = self.url.removesuffix("/v1") + path
        async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as response:
            answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise EngineError(f"the fake server refused {path}: {answer.get('error')}")
        return answer
