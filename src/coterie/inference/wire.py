"""What goes over the wire to a server that speaks vLLM's API, and what comes back.

Everything that reaches a server is a `WireRequest` sent by a `Transport` to one `ServerSpec`; the answer is a
`WireReply` or a `ServerFault` whose kind says what may be done next:

    kind           seen as                          what the pool does
    CONNECTION     refused, reset, DNS              another server
    TIMEOUT        no answer before the deadline    another server
    OVERLOADED     503, 429 (Retry-After)           another server, this one after its pause
    SERVER         500, 502, 504, unreadable body   probe; breaker when the probe fails too
    MISSING        404 on a model name              load the adapter there, once, and ask again
    UNAUTHORIZED   401, 403                         this server leaves the pool; the message names the setting
    REJECTED       400, 413, 422, other 4xx         never retried; reported with the server's own message
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from coterie.errors import ConfigError, EngineError, RequestError
from coterie.types import Tier


class FaultKind(StrEnum):
    """Why a call failed; see the table above."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    SERVER = "server"
    MISSING = "missing"
    UNAUTHORIZED = "unauthorized"
    REJECTED = "rejected"


class ServerFault(EngineError):  # noqa: N818 - a fault is what the table above names
    """One failed call to one server. Never holds a key or a prompt."""

    def __init__(
        self, kind: FaultKind, server: str, message: str, *, status: int | None = None, retry_after_s: float = 0.0
    ) -> None:
        """`message`: the server's own words where it gave some. `retry_after_s`: its Retry-After, else 0."""
        code = f" ({status})" if status is not None else ""
        super().__init__(f"{server}: {kind}{code}: {message}")
        self.kind = kind
        self.message = message
        self.server = server
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        """Kind and message, where the server is named anyhow."""
        return f"{self.kind}: {self.message}"


class RejectedRequest(ServerFault, RequestError):  # noqa: N818 - a fault like the others
    """A REJECTED fault as an engine reports it: the request is at fault, so its episode fails and the run goes on."""

    @staticmethod
    def of(fault: ServerFault) -> RejectedRequest:
        """The same fault."""
        return RejectedRequest(fault.kind, fault.server, fault.message, status=fault.status)


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One server, as configured."""

    url: str
    """Of the API, ending in /v1 (see `server_spec`)."""
    name: str
    """host:port, for logs and metrics."""
    api_key: str | None = field(default=None, repr=False)
    paths: tuple[tuple[str, str], ...] = ()
    """(our directory, the same directory as this server sees it), for adapters; the longest match wins."""

    @property
    def root(self) -> str:
        """The url without /v1, where /health and /metrics are."""
        return self.url.removesuffix("/v1")

    def sees(self, path: str) -> str:
        """`path` as this server sees it."""
        for ours, theirs in sorted(self.paths, key=lambda pair: -len(pair[0])):
            if path == ours or path.startswith(ours.rstrip("/") + "/"):
                return theirs.rstrip("/") + path[len(ours.rstrip("/")) :]
        return path


def server_spec(url: str, api_key: str | None = None, paths: Mapping[str, str] | None = None) -> ServerSpec:
    """The spec of a url such as "http://host:8000" or "http://host:8000/v1/".

    Raises:
        ConfigError: not an http or https url with a host, or one with a user or password in it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"server url {url!r}: write it as http://host:port or https://host:port/v1")
    if parts.username or parts.password:
        raise ConfigError(f"server url with a user or password ({parts.hostname}): give the key by api_key_env instead")
    path = parts.path.rstrip("/")
    if not path.endswith("/v1"):
        path += "/v1"
    return ServerSpec(
        url=urlunsplit((parts.scheme, parts.netloc, path, "", "")),
        name=parts.netloc,
        api_key=api_key,
        paths=tuple((paths or {}).items()),
    )


@dataclass(frozen=True, slots=True)
class WireRequest:
    """One request in vLLM's terms. With `prompt_ids` it goes to /completions, with `messages` to /chat/completions."""

    model: str
    """A served name: the base model's, or an adapter's."""
    prompt_ids: tuple[int, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    """OpenAI chat messages. A last one of role "assistant" is continued, not answered."""
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None
    """Only these token ids may be sampled, at every step."""
    bias: Mapping[int, float] | None = None
    """Added to these ids' logits before temperature."""
    capture: bool = True
    """Whether token ids and log-probabilities must come back; without them nothing can be trained."""
    top: int = 0
    """How many of the likeliest tokens' log-probabilities must come back at every step (`WireReply.top_logprobs`);
    servers give 20 at most unless started with a larger --max-logprobs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More body fields, as they are (tools, response_format, structured_outputs, …)."""


@dataclass(frozen=True, slots=True)
class WireReply:
    """One answer. Ids and log-probabilities are None where the server gave none."""

    text: str
    finish_reason: str
    prompt_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    """Of each prompt id after the first, at temperature 1, where asked for with extra {"prompt_logprobs": 0}; under an
    adapter vLLM's CPU build dies of that when another request is in the same step."""
    top_logprobs: tuple[Mapping[int, float], ...] | None = None
    """For each token, token id -> log-probability of the likeliest ids at that step and of the sampled one."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    """The name the server says answered."""
    server: str = ""
    latency_s: float = 0.0


class Transport(Protocol):
    """Sends requests; knows no routing and never retries."""

    tier: Tier

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        """Raises `ServerFault`. Cancelling the coroutine cancels the request on the server."""
        ...

    async def close(self) -> None: ...


class ServerControl(Protocol):
    """The side of a server that is not generation. Each raises `ServerFault`."""

    async def models(self, server: ServerSpec) -> tuple[str, ...]:
        """Served names: the base and every loaded adapter."""
        ...

    async def load_adapter(self, server: ServerSpec, name: str, path: str) -> None:
        """`path` is already the server's own. Loading a name that is loaded is not an error."""
        ...

    async def unload_adapter(self, server: ServerSpec, name: str) -> None:
        """Unloading a name that is not loaded is not an error."""
        ...

    async def health(self, server: ServerSpec) -> None:
        """Returns when the server says it is well; a sleeping or paused server is not (SERVER)."""
        ...

    async def metrics(self, server: ServerSpec) -> Mapping[str, float]:
        """Prometheus samples by name, those of one name added up; empty where the server has none."""
        ...
