"""CAMEL, in both directions: its model objects carry our calls, and our backend serves its agents.

    CamelTransport       WireRequest -> a CAMEL model made by ModelFactory -> server       the tier `camel`
    CoterieModelBackend  ChatAgent -> BaseModelBackend of ours -> ServerPool -> server     agents that are trained

Importing this module needs the extra `camel`; nothing else in Coterie imports it at the top. CAMEL's clients retry
by themselves, against the same server, and cost some four milliseconds a call: models made here get a client of ours
(aiohttp, one try), so that retries and routing stay the pool's. Models a user made keep their own client, without its
retries. What is trained on are the token ids a server reports; texts, which CAMEL edits (`<think>` parts are cut out),
never are.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.errors import ConfigError, EngineError

try:
    import openai
    from camel.models import BaseModelBackend, ModelFactory
    from camel.models.openai_compatible_model import OpenAICompatibleModel
    from camel.types import (
        ChatCompletion,
        ChatCompletionMessage,
        Choice,
        ModelPlatformType,
        UnifiedModelType,
    )
    from camel.utils import BaseTokenCounter
except ImportError as problem:
    if problem.name is not None and problem.name.partition(".")[0] == "mcp":
        raise ConfigError(
            f"camel-ai does not work with the installed mcp ({problem}); pip install 'mcp<2'"
        ) from problem
    raise ConfigError(
        f"the camel tier and CoterieModelBackend need camel-ai ({problem}); pip install 'coterie[camel]'"
    ) from problem

from coterie.inference.agent_calls import (
    AgentCalls,
    CapturedCall,
    answer_tokens,
    chat_completion,
    check_settings,
    wire_request,
)
from coterie.inference.bodies import body_of, fault_of, reply_of
from coterie.inference.calls import CallSink
from coterie.inference.counting import ByteCounter, ChatCounter, counter_for
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.loop_thread import LoopThread
from coterie.inference.pool import ServerPool
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, Transport, WireReply, WireRequest, server_spec
from coterie.types import AdapterVersion, Tier

__all__ = ["CamelTransport", "CapturedCall", "CoterieModelBackend", "CoterieTokenCounter"]

_OPENAI = frozenset({"temperature", "max_tokens", "top_p", "seed", "logprobs", "top_logprobs", "logit_bias"})
"""Body fields that the openai package takes by name; the others travel in `extra_body`."""


class CoterieTokenCounter(BaseTokenCounter):  # type: ignore[misc]  # camel-ai is an extra, so unknown to the type checker
    """A `ChatCounter` as CAMEL wants it. CAMEL's default downloads data when an agent is made, and fails offline."""

    def __init__(self, counter: ChatCounter) -> None:
        self.counter = counter

    def count_tokens_from_messages(self, messages: list[Any]) -> int:
        """Tokens of the messages under the model's chat template, without what opens every chat."""
        return self.counter.count_tokens_from_messages(messages)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.counter.encode(text)

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids."""
        return self.counter.decode(token_ids)


class CamelTransport(Transport):
    """Sends chats through CAMEL's model objects, one for each server. See the module."""

    tier = Tier.CAMEL

    def __init__(
        self, models: Sequence[BaseModelBackend] = (), *, http: HttpTransport | None = None, api_key: str | None = None
    ) -> None:
        """
        Args:
            models: made by `ModelFactory.create(ModelPlatformType.VLLM, …, url=…)`; each serves the server of its url,
                and requests decide everything about sampling. For other servers models are made here.
            http: what models made here send with; None: one of its own.
            api_key: of the servers of `models`, for asking them for health and adapters; their own calls carry
                whatever headers they were made with.

        Raises:
            ConfigError: a model without url, or of a kind that cannot be asked for token ids.
        """
        self._http = http or HttpTransport()
        self._given: dict[str, BaseModelBackend] = {}
        self._made: dict[str, BaseModelBackend] = {}
        self._servers: list[ServerSpec] = []
        for model in models:
            server = _server_of(model, api_key)
            if server.name not in self._given:
                self._servers.append(server)
            self._given[server.name] = model

    @property
    def servers(self) -> tuple[ServerSpec, ...]:
        """The servers of the models that were given, for a `ServerPool`."""
        return tuple(self._servers)

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        """Send one chat and read its answer. Raises `ServerFault`."""
        if not request.messages or request.prompt_ids:
            raise ServerFault(FaultKind.REJECTED, server.name, "not sent: CAMEL speaks in messages, not in prompt ids")
        body = body_of(request)
        messages = [dict(message) for message in body.pop("messages")]
        tools = body.pop("tools", None)
        start = time.perf_counter()
        given = self._given.get(server.name)
        if given is None:
            client = _Client(self._http, server, request, timeout_s)
            model = _for_call(self._model_for(server), body, client, {})
            await model.arun(messages, None, tools)
            data = client.data
        else:
            client = given._async_client.with_options(max_retries=0, timeout=timeout_s)
            model = _for_call(given, body, client, given.model_config_dict)
            data = await _ask(model, messages, tools, server, request, timeout_s)
        return reply_of(data, request, server.name, time.perf_counter() - start)

    async def close(self) -> None:
        """Close connections. Clients of models that were given are their owner's to close."""
        await self._http.close()
        made, self._made = self._made, {}
        for model in made.values():
            model._client.close()
            await model._async_client.close()

    def _model_for(self, server: ServerSpec) -> BaseModelBackend:
        model = self._made.get(server.name)
        if model is None:
            model = self._made[server.name] = ModelFactory.create(
                model_platform=ModelPlatformType.VLLM,
                model_type="any",  # each call names its own
                model_config_dict={},
                token_counter=CoterieTokenCounter(ByteCounter()),
                url=server.url,
                max_retries=0,
            )
        return model


class CoterieModelBackend(BaseModelBackend):  # type: ignore[misc]  # see CoterieTokenCounter
    """The model of CAMEL agents whose calls are captured for training, routed over several servers.

    backend = CoterieModelBackend("smollm2", servers="http://localhost:8000", tokenizer="smollm2-135m-instruct")
    agent = ChatAgent("You are brief.", model=backend)
    answer = agent.step("Hello")                      # or: await agent.astep("Hello")
    (call,) = backend.captured()                      # ids, log-probabilities, tool calls
    backend.close()
    """

    def __init__(
        self,
        model_type: str,
        model_config_dict: dict[str, Any] | None = None,
        *,
        servers: str | Sequence[str] | Fleet,
        tokenizer: str | Path | None = None,
        context: int = 4096,
        adapter: Callable[[], AdapterVersion | None] | None = None,
        capture: bool = True,
        on_call: Callable[[CapturedCall], None] | None = None,
        keep: int = 1024,
        timeout_s: float = 120.0,
        api_key: str | None = None,
        policy: str = "power_of_two",
        max_in_flight: int = 64,
        calls: CallSink | None = None,
    ) -> None:
        """
        Args:
            model_type: served name to ask for; with a fleet, only what CAMEL shows.
            model_config_dict: OpenAI request fields (temperature, max_completion_tokens, tool_choice, …).
            servers: urls of servers, which are then this backend's own, on a thread of its own; or the fleet of a run,
                in whose event loop alone agents may then step (`astep`).
            tokenizer: of the served model, for counting tokens: an embedded model's name or a directory; None: tokens
                are estimated.
            context: tokens the servers take, prompt and answer (--max-model-len).
            adapter, on_call, keep, timeout_s, calls: see `AgentCalls`; `on_call` is called on the backend's thread
                where it has one.
            capture: whether ids and log-probabilities must come back; without them any OpenAI-compatible server will
                do, and nothing can be trained on.
            api_key: of servers given by url.
            policy, max_in_flight: see `ServerPool`, for servers given by url.

        Raises:
            ConfigError: settings that cannot be honoured, no usable url or tokenizer, no room for answers.
        """
        config = dict(model_config_dict or {})
        check_settings(config, capture=capture)
        counter = counter_for(tokenizer)
        self._capture = capture
        self._answer_tokens = answer_tokens(config, context // 4)
        self._room = context - self._answer_tokens - counter.overhead
        if self._room < 1:
            raise ConfigError(
                f"answers of {self._answer_tokens} tokens leave no room for a prompt in a context of {context}; "
                "lower max_completion_tokens"
            )
        super().__init__(
            model_type,
            config,
            token_counter=CoterieTokenCounter(counter),
            timeout=timeout_s,
            max_retries=0,
        )
        transport = HttpTransport()
        self._thread: LoopThread | None = None
        self._closing: list[Callable[[], Awaitable[None]]] = [transport.close]
        if isinstance(servers, Fleet):
            fleet = servers
        else:
            self._thread = LoopThread("coterie-camel")
            control = HttpControl()
            urls = [servers] if isinstance(servers, str) else servers
            pool = ServerPool(
                [server_spec(url, api_key) for url in urls], control, policy=policy, max_in_flight=max_in_flight
            )
            fleet = Fleet(pool, control, model=model_type, closing=(control.close,))
            self._closing.append(fleet.close)
        self._calls = AgentCalls(
            fleet,
            transport,
            adapter=adapter,
            on_call=on_call,
            keep=keep,
            timeout_s=timeout_s,
            calls=calls,
        )

    def captured(self) -> tuple[CapturedCall, ...]:
        """The calls since this was last asked, oldest first; they are not kept any longer. See also `on_call`."""
        return self._calls.captured()

    @property
    def token_counter(self) -> BaseTokenCounter:
        """Counts with the served model's own tokenizer, offline."""
        return self._token_counter

    @property
    def token_limit(self) -> int:
        """Tokens a conversation may have: the context, less the answer and what opens a chat."""
        return self._room

    @property
    def stream(self) -> bool:
        """Never: a captured answer is whole."""
        return False

    def close(self) -> None:
        """Close connections and thread. With a fleet, which is its owner's, use `aclose` in its loop instead."""
        if self._thread is not None:
            self._thread.run(self.aclose())
            self._thread.close()

    async def aclose(self) -> None:
        """Close this backend's own connections in the running event loop."""
        await self._calls.close()
        for close in self._closing:
            await close()

    def _run(self, messages: list[Any], response_format: Any = None, tools: Any = None) -> ChatCompletion:
        if self._thread is None:
            raise EngineError(
                "this backend shares the servers of a run, which live in its event loop; use `await agent.astep(…)`"
            )
        return _answer(self._thread.run(self._ask(messages, response_format, tools)))

    async def _arun(self, messages: list[Any], response_format: Any = None, tools: Any = None) -> ChatCompletion:
        work = self._ask(messages, response_format, tools)
        return _answer(await (work if self._thread is None else self._thread.hop(work)))

    def _ask(self, messages: list[Any], response_format: Any, tools: Any) -> Coroutine[Any, Any, CapturedCall]:
        wire = wire_request(
            self.model_config_dict,
            messages,
            response_format=response_format,
            tools=tools,
            max_tokens=self._answer_tokens,
            capture=self._capture,
        )
        return self._calls.ask(wire)


def _answer(call: CapturedCall) -> ChatCompletion:
    return ChatCompletion.model_validate(chat_completion(call))


def _server_of(model: BaseModelBackend, api_key: str | None) -> ServerSpec:
    kind = type(model).__name__
    if not isinstance(model, OpenAICompatibleModel) or not isinstance(model._async_client, openai.AsyncOpenAI):
        raise ConfigError(
            f"{kind} cannot be asked for token ids; make the model with "
            "ModelFactory.create(ModelPlatformType.VLLM, model_type, url=…)"
        )
    if not model._url:
        raise ConfigError(
            f"{kind} was made without url, and CAMEL then tries to start a server itself; "
            "give ModelFactory.create the argument url"
        )
    return server_spec(str(model._url), api_key)


def _for_call(model: BaseModelBackend, body: dict[str, Any], client: Any, owner: Mapping[str, Any]) -> BaseModelBackend:
    """`model` as one call needs it: CAMEL keeps name and settings on the object, and a call has its own.

    Of the owner's settings only `user` and `extra_body` stay, below the call's: another temperature or top_p than the
    one the learner is told of would train on wrong probabilities.
    """
    name = body.pop("model")
    config: dict[str, Any] = {"user": owner["user"]} if owner.get("user") else {}
    config.update({key: value for key, value in body.items() if key in _OPENAI})
    rest = {key: value for key, value in body.items() if key not in _OPENAI}
    config["extra_body"] = {**(owner.get("extra_body") or {}), **rest}
    one = copy.copy(model)
    one.model_type = UnifiedModelType(name)
    one.model_config_dict = config
    one._async_client = client
    return one


async def _ask(
    model: BaseModelBackend, messages: list[Any], tools: Any, server: ServerSpec, request: WireRequest, timeout_s: float
) -> Any:
    """What a user's own client gives, as JSON would. Raises `ServerFault`."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await model.arun(messages, None, tools)
    except (TimeoutError, openai.APITimeoutError):
        fault = ServerFault(FaultKind.TIMEOUT, server.name, f"no answer within {timeout_s:g} s")
    except openai.APIStatusError as error:
        answered = error.response
        fault = fault_of(server, answered.status_code, answered.headers, answered.content, request)
    except openai.APIConnectionError as error:
        why = str(error.__cause__ or error) or type(error).__name__
        fault = ServerFault(FaultKind.CONNECTION, server.name, why)
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, KeyError) as error:
        # clients and CAMEL read an answer that is none without looking, each failing in its own way
        fault = ServerFault(FaultKind.SERVER, server.name, f"unreadable answer: {type(error).__name__}")
    else:
        if isinstance(answer, ChatCompletion):
            return answer.model_dump()
        fault = ServerFault(FaultKind.SERVER, server.name, f"unreadable answer: {type(answer).__name__}")
    raise fault  # out here, because errors of clients carry the request's headers, and so the key


class _Client:
    """What a CAMEL model made here calls as its AsyncOpenAI: `client.chat.completions.create(**body)`, once."""

    def __init__(self, http: HttpTransport, server: ServerSpec, request: WireRequest, timeout_s: float) -> None:
        self._http, self._server, self._request, self._timeout_s = http, server, request, timeout_s
        self.data: Any = None
        """The server's answer, untouched by CAMEL."""
        self.chat = self
        self.completions = self

    async def create(self, *, extra_body: Mapping[str, Any] | None = None, **fields: Any) -> ChatCompletion:
        """Post what CAMEL says."""
        body = {**fields, **(extra_body or {})}
        self.data = await self._http.post(self._server, "/chat/completions", body, self._timeout_s, self._request)
        return _shown(self.data)


def _shown(data: Any) -> ChatCompletion:
    """The answer's text in CAMEL's form, for its logs. Validating all of it would cost more than the call."""
    choices = data.get("choices") if isinstance(data, dict) else None
    texts = [choice.get("message") or {} for choice in choices or () if isinstance(choice, dict)]
    return ChatCompletion.model_construct(
        choices=[
            Choice.model_construct(
                index=index,
                message=ChatCompletionMessage.model_construct(role="assistant", content=text.get("content")),
            )
            for index, text in enumerate(texts)
        ]
    )
