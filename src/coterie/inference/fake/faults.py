"""Faults on command, and what the fake is told to say."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

from coterie.inference.fake.answers import Answer, Json
from coterie.inference.fake.tokens import tool_text

Where = Literal["generate", "adapters", "health"]
"""Which requests a failure is for: generation, loading and unloading, or /health."""

REASONS = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "The model does not exist.",
    429: "Too many requests",
    500: "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    502: "Bad gateway",
    503: "The engine is currently busy and cannot accept new requests. Please try again later or on a different "
    "instance.",
    504: "Gateway timeout",
}


@dataclass(slots=True)
class _Fault:
    """What happens instead of an answer, `times` times (None: until `mend`)."""

    act: Callable[[web.BaseRequest, Answer | None], Awaitable[web.StreamResponse]]
    times: int | None
    midway: bool = False
    """Happens after the answer was made, rather than before."""


class Faults:
    """Everything a `FakeServer` can be told to do wrong while it runs."""

    def __init__(self) -> None:
        self._faults: dict[Where, deque[_Fault]] = {"generate": deque(), "adapters": deque(), "health": deque()}
        self._said: deque[tuple[str, tuple[str, str] | None]] = deque()
        self._stale: dict[str, str] = {}
        self._outdated: set[str] = set()
        self._misreported = 0
        self._factor = 1.0
        self._halted: set[str] = set()
        self._awake = asyncio.Event()
        self._awake.set()

    def fail(
        self,
        status: int,
        times: int | None = 1,
        message: str = "",
        *,
        retry_after: str | float | None = None,
        where: Where = "generate",
        midway: bool = False,
    ) -> None:
        """Answer with an error `times` times (None: until `mend`).

        `retry_after`: the Retry-After header. `midway`: streams break off with the error after their first tokens.
        """
        text = message or REASONS.get(status, "Internal server error")
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

        async def act(request: web.BaseRequest, answer: Answer | None) -> web.StreamResponse:
            if answer is None or not answer.settings.stream:
                return error(status, text, headers=headers)
            response = await open_stream(request)
            for event, _ in zip(answer.events(), range(2), strict=False):
                await response.write(event)
            await response.write(b"data: " + json.dumps(error_body(status, text)).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response

        self._faults[where].append(_Fault(act, times, midway))

    def drop(self, times: int | None = 1) -> None:
        """Close the connection in the middle of the answer."""

        async def act(request: web.BaseRequest, answer: Answer | None) -> web.StreamResponse:
            assert answer is not None
            if answer.settings.stream:
                response = await open_stream(request)
                for event, _ in zip(answer.events(), range(2), strict=False):
                    await response.write(event)
            else:
                body = json.dumps(answer.whole()).encode()
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                response.content_length = len(body)
                await response.prepare(request)
                await response.write(body[: len(body) // 2])
            if request.transport is not None:
                request.transport.close()
            return response

        self._faults["generate"].append(_Fault(act, times, midway=True))

    def garble(self, times: int | None = 1, body: bytes = b"<html>it works!</html>") -> None:
        """Answer 200 with a body that is no answer."""

        async def act(request: web.BaseRequest, answer: Answer | None) -> web.StreamResponse:
            return web.Response(body=body, content_type="application/json")

        self._faults["generate"].append(_Fault(act, times))

    def retokenise(self, times: int = 1) -> None:
        """Report other prompt ids than were asked about, as a server does that decodes and encodes the prompt."""
        self._misreported += times

    def mend(self) -> None:
        """Take back every fault but a death: failures, halts, slowness and stale adapters."""
        for faults in self._faults.values():
            faults.clear()
        self._halted.clear()
        self._awake.set()
        self._stale.clear()
        self._outdated.clear()
        self._misreported, self._factor = 0, 1.0

    def hang(self) -> None:
        """Let generation requests, those under way too, wait until `mend`; nothing else shows it."""
        self._halt("hang")

    def sleep(self) -> None:
        """As vLLM's /sleep: requests hang, /health says 200, /is_sleeping says so."""
        self._halt("sleep")

    def pause(self) -> None:
        """As vLLM's /pause."""
        self._halt("pause")

    def wake(self) -> None:
        """End `hang`, `sleep` and `pause`."""
        self._halted.clear()
        self._awake.set()

    def slow(self, factor: float) -> None:
        """Take `factor` times as long from now on."""
        self._factor = factor

    def say(self, text: str, times: int = 1) -> None:
        """Answer the next `times` requests with this text, then an end token."""
        self._said.extend([(text, None)] * times)

    def say_tool(self, name: str, arguments: Mapping[str, Any], times: int = 1) -> None:
        """Answer the next `times` requests with a call of this tool."""
        self._said.extend([(tool_text(name, arguments), (name, json.dumps(arguments)))] * times)

    def _halt(self, how: str) -> None:
        self._halted.add(how)
        self._awake.clear()

    async def _planned(
        self, where: Where, request: web.BaseRequest, answer: Answer | None = None
    ) -> web.StreamResponse | None:
        """The fault that is due, if any: the first in order of command that happens at this moment."""
        faults = self._faults[where]
        for fault in list(faults):
            if fault.midway != (answer is not None):
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    faults.remove(fault)
            return await fault.act(request, answer)
        return None

    async def _take(self, seconds: float) -> None:
        """Let work of that many seconds pass, and whatever halts it."""
        if seconds:
            await asyncio.sleep(seconds * self._factor)
        await self._awake.wait()


async def open_stream(request: web.BaseRequest) -> web.StreamResponse:
    """A started answer of server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


def error_body(status: int, message: str, type_: str = "", param: str | None = None) -> Json:
    if not type_:
        type_ = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": message, "type": type_, "param": param, "code": status}}


def error(
    status: int,
    message: str,
    type_: str = "",
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    return web.json_response(error_body(status, message, type_, param), status=status, headers=headers)
