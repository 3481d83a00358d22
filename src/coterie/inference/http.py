"""The HTTP tier: calls to vLLM-compatible servers over pooled connections.

One `HttpTransport` serves every server and every task of an event loop. A call is one request on one kept-alive
connection; its deadline covers everything, waiting for a connection included. Ending a call early in any way, by
deadline, cancellation or leaving a stream, closes its connection, which is how a vLLM server learns to stop
generating. Nothing is retried here, nothing is followed (a redirect would carry the key elsewhere), and answers are
bounded in size. Keys stand in the Authorization header and nowhere else.

    transport = HttpTransport()
    reply = await transport.call(server_spec("http://localhost:8000"), WireRequest("model", (1, 2, 3)), timeout_s=30)
    await transport.close()
"""

from __future__ import annotations

import asyncio
import io
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from coterie.inference.bodies import body_of, decode, encode, fault_of, path_of, reply_of
from coterie.inference.wire import FaultKind, ServerControl, ServerFault, ServerSpec, Transport, WireReply, WireRequest
from coterie.types import Tier

MAX_ANSWER_BYTES = 64 * 2**20
"""Of one answer, streamed or whole; the log-probabilities of a long prompt are some megabytes."""

_ERROR_BYTES = 64 * 2**10
_KEEP_ALIVE_S = 4.0
"""vLLM closes idle connections after 5 s; letting go of them before keeps a call from being sent into a closing one."""
_FAILURES = (TimeoutError, aiohttp.ClientError, OSError, ValueError)
_JSON = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(slots=True)
class _Answer:
    """A whole answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    raw: bytes


class _Connections:
    """One session per event loop, opened at first use; `close` closes them, and a later use opens another."""

    def __init__(self, per_server: int, connect_timeout_s: float, tls: ssl.SSLContext | None) -> None:
        self._per_server = per_server
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            for other in [known for known in self._sessions if known.is_closed()]:
                await self._sessions.pop(other).close()
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    limit_per_host=self._per_server,
                    keepalive_timeout=_KEEP_ALIVE_S,
                    ssl=True if self._tls is None else self._tls,
                ),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # bodies are asked for plain, and a packed one could be of any size
            )
        return session

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def send(
        self, server: ServerSpec, method: str, url: str, body: bytes | None, timeout_s: float, max_bytes: int
    ) -> _Answer:
        """One request and its whole answer. Raises `ServerFault` when there is none."""
        # aiohttp asks for large bodies as files, so that copying them does not hold up the loop
        data = io.BytesIO(body) if body is not None and len(body) >= 2**20 else body
        try:
            async with asyncio.timeout(timeout_s):
                session = await self.session()
                async with session.request(
                    method, url, data=data, headers=_headers(server), allow_redirects=False
                ) as response:
                    limit = max_bytes if response.status == 200 else min(max_bytes, _ERROR_BYTES)
                    raw = await _read(server, response, limit)
                    return _Answer(response.status, response.headers, raw)
        except _FAILURES as error:
            fault = self.fault(server, error, timeout_s)
        raise fault  # out here, because errors of aiohttp carry the request's headers, and so the key

    def fault(self, server: ServerSpec, error: Exception, timeout_s: float) -> ServerFault:
        """What a failure of the connection means."""
        if isinstance(error, aiohttp.ServerTimeoutError):  # of connecting; aiohttp is given no other limit
            return ServerFault(FaultKind.CONNECTION, server.name, f"no connection within {self._connect_timeout_s:g} s")
        if isinstance(error, TimeoutError):
            return ServerFault(FaultKind.TIMEOUT, server.name, f"no answer within {timeout_s:g} s")
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            why = f"{error.certificate_error}; if its certificate is your own, name your CA file in SSL_CERT_FILE"
            return ServerFault(FaultKind.CONNECTION, server.name, why)
        if isinstance(error, ValueError):  # before anything was sent: a url or a key no header can hold
            why = f"not sent: {type(error).__name__}; check the server's url and key"
            return ServerFault(FaultKind.REJECTED, server.name, why)
        if isinstance(error, aiohttp.ClientPayloadError):
            why = "the connection broke before the answer was complete"
            return ServerFault(FaultKind.CONNECTION, server.name, why)
        if isinstance(error, aiohttp.ClientConnectionError | OSError):
            return ServerFault(FaultKind.CONNECTION, server.name, str(error) or type(error).__name__)
        return ServerFault(FaultKind.SERVER, server.name, f"no HTTP: {type(error).__name__}")


def _headers(server: ServerSpec) -> Mapping[str, str]:
    if server.api_key is None:
        return _JSON
    return {**_JSON, "Authorization": f"Bearer {server.api_key.strip()}"}


async def _read(server: ServerSpec, response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body; of an error its beginning is enough, of an answer more than `limit` bytes is a fault."""
    size = response.content_length
    if size is not None and size <= limit:
        return await response.read()
    if response.status == 200 and size is not None:
        raise ServerFault(FaultKind.SERVER, server.name, f"answer of {size} bytes; {limit} are the most taken")
    parts, total = [], 0
    async for part in response.content.iter_any():
        total += len(part)
        if total > limit:
            response.close()  # not drained: the rest may have no end
            if response.status == 200:
                raise ServerFault(FaultKind.SERVER, server.name, f"answer of more than {limit} bytes; cut off")
            break
        parts.append(part)
    return b"".join(parts)


class HttpTransport(Transport):
    """Sends requests with aiohttp. Open it anywhere; it connects at the first call. See the module's docstring."""

    tier = Tier.HTTP

    def __init__(
        self,
        *,
        connections_per_server: int = 256,
        connect_timeout_s: float = 5.0,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`connections_per_server`: more calls at once wait for one. `tls`: None trusts what the system trusts."""
        self._connections = _Connections(connections_per_server, connect_timeout_s, tls)
        self._max_bytes = max_answer_bytes

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        """Send one request and read its answer. Raises `ServerFault`."""
        body = _encoded(server, request, stream=False)
        start = time.perf_counter()
        url = server.url + path_of(request)
        answer = await self._connections.send(server, "POST", url, body, timeout_s, self._max_bytes)
        if answer.status != 200:
            raise fault_of(server, answer.status, answer.headers, answer.raw, request)
        return reply_of(decode(server.name, answer.raw), request, server.name, time.perf_counter() - start)

    async def post(
        self,
        server: ServerSpec,
        path: str,
        body: Mapping[str, Any],
        timeout_s: float,
        request: WireRequest | None = None,
    ) -> Any:
        """Send a body somebody else wrote to `path` below the API's url and return the answer's JSON.

        `request`: what the body was made of, so that error messages cannot repeat its prompt. Raises `ServerFault`.
        """
        try:
            raw = encode(body)
        except (TypeError, ValueError) as error:
            raise ServerFault(FaultKind.REJECTED, server.name, f"not sent: {error}") from error
        answer = await self._connections.send(server, "POST", server.url + path, raw, timeout_s, self._max_bytes)
        if answer.status != 200:
            raise fault_of(server, answer.status, answer.headers, answer.raw, request)
        return decode(server.name, answer.raw)

    async def stream(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> AsyncIterator[str]:
        """Pieces of the answer's text as the server makes them; none is empty.

        The deadline is for the whole answer, but only waiting counts: it never interrupts the caller's own work.

        Raises:
            ServerFault: also in the middle: TIMEOUT, what the server reports in the stream, and CONNECTION when the
                stream ends before the answer does.
        """
        body = _encoded(server, request, stream=True)
        deadline = asyncio.get_running_loop().time() + timeout_s
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout_at(deadline):
                session = await self._connections.session()
                response = await session.request(
                    "POST", server.url + path_of(request), data=body, headers=_headers(server), allow_redirects=False
                )
                if response.status != 200:
                    raw = await _read(server, response, _ERROR_BYTES)
                    raise fault_of(server, response.status, response.headers, raw, request)
            done, total, buffer = False, 0, b""
            while not done:
                async with asyncio.timeout_at(deadline):
                    part = await response.content.readany()
                if not part:
                    raise ServerFault(FaultKind.CONNECTION, server.name, "the stream ended before the answer did")
                total += len(part)
                if total > self._max_bytes:
                    raise ServerFault(FaultKind.SERVER, server.name, f"a stream of more than {self._max_bytes} bytes")
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue  # blank lines between events, comments that keep the connection alive
                    event = line[5:].strip()
                    if event == b"[DONE]":
                        done = True
                        break
                    if text := _piece(server, request, event):
                        yield text
        except _FAILURES as error:
            fault = self._connections.fault(server, error, timeout_s)
        else:
            return
        finally:
            if response is not None:
                response.close()
        raise fault

    async def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        await self._connections.close()


def _encoded(server: ServerSpec, request: WireRequest, *, stream: bool) -> bytes:
    try:
        return encode(body_of(request, stream=stream))
    except (TypeError, ValueError) as error:
        raise ServerFault(FaultKind.REJECTED, server.name, f"not sent: {error}") from error


def _piece(server: ServerSpec, request: WireRequest, event: bytes) -> str:
    """The text one event of a stream adds."""
    data = decode(server.name, event)
    if isinstance(data, dict) and data.get("error"):
        inner = data["error"]
        code = inner.get("code") if isinstance(inner, dict) else None
        raise fault_of(server, code if isinstance(code, int) and code >= 400 else 500, {}, event, request)
    try:
        if not data["choices"]:
            return ""  # the usage that closes a stream
        choice = data["choices"][0]
        if choice.get("finish_reason") in ("abort", "error"):
            raise ServerFault(FaultKind.SERVER, server.name, "the server gave the request up")
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerFault(FaultKind.SERVER, server.name, f"unreadable event: {type(error).__name__}") from error
    return text if isinstance(text, str) else ""


class HttpControl(ServerControl):
    """Everything about a server that is not generation, over its own few connections."""

    def __init__(
        self, *, timeout_s: float = 10.0, load_timeout_s: float = 60.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """`load_timeout_s`: for loading and unloading adapters, which wait for the server's current work."""
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._connections = _Connections(8, min(5.0, timeout_s), tls)

    async def models(self, server: ServerSpec) -> tuple[str, ...]:
        """Served names: the base first, then every loaded adapter."""
        answer = await self._get(server, server.url + "/models")
        try:
            return tuple(str(entry["id"]) for entry in decode(server.name, answer.raw)["data"])
        except (KeyError, TypeError) as error:
            raise ServerFault(FaultKind.SERVER, server.name, "/v1/models did not answer with models") from error

    async def load_adapter(self, server: ServerSpec, name: str, path: str) -> None:
        """Load the adapter at `path`, as the server sees it, under `name`. One that is loaded stays as it is."""
        body = {"lora_name": name, "lora_path": path}
        fault = await self._adapter(server, "/load_lora_adapter", body)
        if fault is None or (fault.status == 400 and "already" in str(fault) and "loaded" in str(fault)):
            return
        if fault.kind is FaultKind.MISSING:  # of the directory, not of a model that could be loaded
            why = f"it finds no adapter at {path}; if it sees the files elsewhere, map the directory in paths ({fault})"
            raise ServerFault(FaultKind.REJECTED, server.name, why, status=fault.status)
        raise fault

    async def unload_adapter(self, server: ServerSpec, name: str) -> None:
        """Unload `name`; one that is not loaded is no error."""
        fault = await self._adapter(server, "/unload_lora_adapter", {"lora_name": name})
        if fault is not None and fault.kind is not FaultKind.MISSING:
            raise fault

    async def health(self, server: ServerSpec) -> None:
        """Returns when the server says it is well, neither asleep nor paused. Servers without /health must list models.

        A paused or sleeping vLLM answers /health with 200 while requests hang, so it is asked about both; servers
        that cannot be asked (404) are believed.
        """
        async with asyncio.TaskGroup() as group:
            alive = group.create_task(self._attempt(server, "/health"))
            asleep = group.create_task(self._attempt(server, "/is_sleeping"))
            paused = group.create_task(self._attempt(server, "/is_paused"))
        answer = _unless_fault(alive.result())
        if answer.status == 404:
            await self.models(server)
        elif answer.status != 200:
            raise fault_of(server, answer.status, answer.headers, answer.raw)
        for found, key, what in ((asleep, "is_sleeping", "asleep"), (paused, "is_paused", "paused")):
            said = _unless_fault(found.result())
            if said.status >= 500:
                raise fault_of(server, said.status, said.headers, said.raw)
            if said.status != 200:
                continue
            state = decode(server.name, said.raw)
            if isinstance(state, dict) and state.get(key):
                raise ServerFault(FaultKind.SERVER, server.name, f"it is {what}; wake it or take it from the pool")

    async def metrics(self, server: ServerSpec) -> Mapping[str, float]:
        """Prometheus samples by name, those of one name added up; empty where the server has none."""
        answer = await self._send(server, "GET", server.root + "/metrics", None, self._timeout_s)
        if answer.status == 404:
            return {}
        if answer.status != 200:
            raise fault_of(server, answer.status, answer.headers, answer.raw)
        return prometheus_sums(answer.raw.decode("utf-8", "replace"))

    async def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        await self._connections.close()

    async def _adapter(self, server: ServerSpec, path: str, body: Mapping[str, Any]) -> ServerFault | None:
        answer = await self._send(server, "POST", server.url + path, encode(body), self._load_timeout_s)
        if answer.status == 200:
            return None
        fault = fault_of(server, answer.status, answer.headers, answer.raw)
        if fault.status == 404 and fault.kind is FaultKind.REJECTED:
            why = "it cannot change adapters; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            return ServerFault(FaultKind.REJECTED, server.name, why, status=404)
        return fault

    async def _attempt(self, server: ServerSpec, path: str) -> _Answer | ServerFault:
        try:
            return await self._send(server, "GET", server.root + path, None, self._timeout_s)
        except ServerFault as fault:  # one that is lost says no more than the others: all are awaited
            return fault

    async def _get(self, server: ServerSpec, url: str) -> _Answer:
        answer = await self._send(server, "GET", url, None, self._timeout_s)
        if answer.status != 200:
            raise fault_of(server, answer.status, answer.headers, answer.raw)
        return answer

    async def _send(self, server: ServerSpec, method: str, url: str, body: bytes | None, timeout_s: float) -> _Answer:
        return await self._connections.send(server, method, url, body, timeout_s, MAX_ANSWER_BYTES)


def _unless_fault(found: _Answer | ServerFault) -> _Answer:
    if isinstance(found, ServerFault):
        raise found
    return found


def prometheus_sums(text: str) -> dict[str, float]:
    """Samples of the Prometheus text format by name, those of one name added up, NaN left out.

    The library's own parser takes some ten milliseconds for a vLLM server's page, too long in the event loop.
    """
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        brace = line.find("{")
        name, rest = (line[:brace], line[line.rfind("}") + 1 :]) if brace >= 0 else line.partition(" ")[::2]
        try:
            value = float(rest.split()[0])  # a time stamp may follow
        except (ValueError, IndexError):
            continue
        if value == value:
            sums[name] = sums.get(name, 0.0) + value
    return sums
