"""The fake server itself: vLLM's routes, a queue, and faults on command. See the package's docstring."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from coterie.errors import AdapterError, EngineError
from coterie.inference.fake.answers import Answer, Json
from coterie.inference.fake.faults import REASONS, Faults, error, open_stream
from coterie.inference.fake.generation import LogprobsMode, generate
from coterie.inference.fake.metrics import Counters, PrefixCache, page
from coterie.inference.fake.policy import FakePolicy, adapter_weights
from coterie.inference.fake.requests import RefusedError, Settings, read_json, read_prompts, read_settings, saying
from coterie.inference.fake.slots import Slots
from coterie.inference.fake.tokens import ByteTokenizer, FakeTokenizer
from coterie.inference.wire import ServerSpec, server_spec


@dataclass(frozen=True, slots=True)
class _Adapter:
    path: str
    weights: str


class FakeServer(Faults):
    """A stand-in for one vLLM server, in the event loop that opens it: ``async with FakeServer() as server``.

    What it counts: `calls` (generation requests that arrived), `answered` (answered whole), `cancelled` (given up by
    their callers), `requests` (the last 10,000 bodies), `running`, `most_running` and `waiting` (at once).
    """

    def __init__(
        self,
        *,
        model: str = "fake-model",
        seed: int = 0,
        latency_s: float = 0.0,
        per_token_s: float = 0.0,
        per_prompt_token_s: float = 0.0,
        slots: int | None = None,
        max_waiting: int | None = None,
        tokenizer: FakeTokenizer | None = None,
        api_key: str | None = None,
        port: int = 0,
        max_model_len: int = 2048,
        max_lora_rank: int = 16,
        max_logprobs: int = 20,
        logprobs_mode: LogprobsMode = "processed_logprobs",
        gives_ids: bool = True,
        adapters: bool = True,
        dev_mode: bool = True,
        keep_alive_s: float = 5.0,
        cpu_build: bool = False,
    ) -> None:
        """
        Args:
            model: Served name of the base. seed: Of its weights; servers of one seed answer alike.
            latency_s: Of every generation. per_token_s: More for every generated token. per_prompt_token_s: More for
                every prompt token that no earlier prompt began with, in blocks of 16, as with vLLM's prefix cache.
            slots: Generations at once; more wait in order. None: all at once.
            max_waiting: Past so many waiting ones requests are refused with 503, as with --max-num-queued-reqs.
            tokenizer: None: bytes. api_key: What /v1 asks for. port: 0: a free one.
            logprobs_mode: "raw_logprobs" is vLLM's default: temperature, bias and allowed set not included.
            gives_ids: False: does not know return_token_ids. adapters: False: started without runtime loading.
            dev_mode: Whether /is_sleeping and /is_paused exist.
            keep_alive_s: After which an idle connection is closed, vLLM's by default: clients that keep them as long
                send now and then into one that is closing.
            cpu_build: Die as vLLM's does of prompt_logprobs under an adapter while another request is under way.
        """
        super().__init__()
        self.model, self.seed, self.port = model, seed, port
        self.latency_s, self.per_token_s, self.per_prompt_token_s = latency_s, per_token_s, per_prompt_token_s
        self.max_waiting = max_waiting
        self.tokenizer: FakeTokenizer = tokenizer or ByteTokenizer()
        self.api_key = api_key
        self.max_model_len, self.max_lora_rank, self.max_logprobs = max_model_len, max_lora_rank, max_logprobs
        self.logprobs_mode, self.gives_ids = logprobs_mode, gives_ids
        self.adapters, self.dev_mode, self.keep_alive_s, self.cpu_build = adapters, dev_mode, keep_alive_s, cpu_build
        self.calls = self.answered = self.cancelled = 0
        self.requests: deque[Json] = deque(maxlen=10_000)
        self._loaded: dict[str, _Adapter] = {}
        self._dead = False
        self._slots = Slots(slots)
        self._counters = Counters()
        self._cache = PrefixCache()
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._routes: dict[tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/version"): self._version,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
        }
        if adapters:
            self._routes["POST", "/v1/load_lora_adapter"] = self._load
            self._routes["POST", "/v1/unload_lora_adapter"] = self._unload
        if dev_mode:
            self._routes["GET", "/is_sleeping"] = self._is_sleeping
            self._routes["GET", "/is_paused"] = self._is_paused

    # -- running it ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> FakeServer:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        http = self._http
        self.kill()
        if http is not None:
            await http.shutdown(0.1)

    @property
    def url(self) -> str:
        """Of the API, ending in /v1. Known once it listens."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def spec(self) -> ServerSpec:
        """What a transport is given to reach it, key included."""
        return server_spec(self.url, self.api_key)

    @property
    def loaded(self) -> Mapping[str, str]:
        """Served adapter name -> the directory it was loaded from."""
        return {name: adapter.path for name, adapter in self._loaded.items()}

    @property
    def running(self) -> int:
        """Generations under way."""
        return self._slots.running

    @property
    def most_running(self) -> int:
        """The most there ever were."""
        return self._slots.most_running

    @property
    def waiting(self) -> int:
        """Generations waiting for a slot."""
        return self._slots.waiting

    def policy(self, name: str | None = None, *, anew: bool = False) -> FakePolicy:
        """What answers under a served name (None: the base), to recompute its probabilities with. `anew`: requests
        that no cache answers, because they bring a cache_salt of their own or want prompt_logprobs."""
        if name is None or name == self.model:
            return FakePolicy(self.seed, self.tokenizer.vocabulary)
        weights = self._loaded[name].weights
        if name in self._outdated and not anew:
            weights = f"outdated {weights}"
        return FakePolicy(self.seed, self.tokenizer.vocabulary, self._stale.get(name, weights))

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()

        def make(
            message: Any, payload: Any, protocol: RequestHandler, writer: Any, task: asyncio.Task[None]
        ) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=2**28)

        self._http = web.Server(
            self._handle,
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self.keep_alive_s,
        )
        self._listener = await loop.create_server(self._http, "127.0.0.1", self.port, backlog=2048)
        self.port = self._listener.sockets[0].getsockname()[1]

    # -- adapters and death ---------------------------------------------------------------------------------------

    def evict(self, name: str) -> None:
        """Forget an adapter, as a restarted server does: requests for it get 404."""
        self._loaded.pop(name, None)
        self._stale.pop(name, None)
        self._outdated.discard(name)

    def serve_stale(self, name: str, like: str | None = None) -> None:
        """Answer for `name` with the weights of the served name `like`, or (None) with weights nobody published."""
        self._stale[name] = f"stale {self._loaded[name].weights}" if like is None else self.policy(like).weights

    def kill(self) -> None:
        """Die: the port is closed, connections break, whatever was under way is lost."""
        listener, self._listener = self._listener, None
        http, self._http = self._http, None
        if listener is not None:
            listener.close()
        for connection in list(http.connections) if http is not None else []:
            if connection.transport is not None:
                connection.transport.abort()

    async def revive(self, *, adapters: bool = False) -> None:
        """Come back at the same port, healthy; without the adapters it had, unless `adapters`."""
        if self._listener is not None:
            raise EngineError(f"the fake server at {self.url} is alive; kill it before it is revived")
        self.mend()
        self._dead = False
        if not adapters:
            self._loaded.clear()
        await self._listen()

    # -- routes -------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.api_key is not None and request.path.startswith("/v1"):
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or key != self.api_key:
                return web.json_response({"error": "Unauthorized"}, status=401)
        route = self._routes.get((request.method, request.path))
        if route is None:
            return error(404, "Not Found", "Not Found")
        try:
            return await route(request)
        except RefusedError as refusal:
            return error(refusal.status, refusal.message, refusal.type, refusal.param)

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        planned = await self._planned("health", request)
        return planned or web.Response(status=503 if self._dead else 200)

    async def _is_sleeping(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"is_sleeping": bool({"sleep", "pause"} & self._halted)})

    async def _is_paused(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"is_paused": "pause" in self._halted})

    async def _version(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"version": "0.0.0+fake"})

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        text = page(self.model, self._slots, self._loaded, self._counters, self._cache)
        return web.Response(text=text)

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        entry = {"object": "model", "created": 0, "owned_by": "vllm", "parent": None}
        served: list[Json] = [{**entry, "id": self.model, "root": self.model, "max_model_len": self.max_model_len}]
        served += [{**entry, "id": n, "root": a.path, "parent": self.model} for n, a in self._loaded.items()]
        return web.json_response({"object": "list", "data": served})

    async def _tokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await read_json(request)
        ids = read_prompts(body, "messages" in body, self.tokenizer, 2**31)[0]
        return web.json_response({"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids})

    async def _detokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await read_json(request)
        return web.json_response({"prompt": self.tokenizer.decode(body.get("tokens") or [])})

    async def _load(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await read_json(request)
        planned = await self._planned("adapters", request)
        if planned is not None:
            return planned
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise RefusedError("Both 'lora_name' and 'lora_path' must be provided.", type_="InvalidUserInput")
        inplace = bool(body.get("load_inplace"))
        if name in self._loaded and not inplace:
            raise RefusedError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                f"set 'load_inplace' to True.",
                type_="InvalidUserInput",
            )
        if not Path(path).is_dir():
            raise RefusedError(f"Loading lora {name} failed: No adapter found for {path}", 404, "NotFoundError")
        try:
            weights = adapter_weights(Path(path), self.max_lora_rank)
        except AdapterError as error:
            raise RefusedError(str(error), 500, "InternalServerError") from error
        before = self._loaded.get(name)
        self._loaded[name] = _Adapter(path, weights)
        if before is not None and before.weights != weights:
            self._outdated.add(name)  # vLLM's cached keys are of what was there before; a fresh salt avoids them
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await read_json(request)
        planned = await self._planned("adapters", request)
        if planned is not None:
            return planned
        name = str(body.get("lora_name") or "")
        if name not in self._loaded:
            raise RefusedError(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
        self.evict(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _completions(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._generation(request, chat=False)

    async def _chat(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._generation(request, chat=True)

    # -- generation ---------------------------------------------------------------------------------------------

    async def _generation(self, request: web.BaseRequest, *, chat: bool) -> web.StreamResponse:
        self.calls += 1
        number = self.calls
        try:
            body = await read_json(request)
            self.requests.append(body)
            planned = await self._planned("generate", request)
            if planned is not None:
                return planned
            answer, cost_s = self._prepare(body, chat, number)
            scores = answer.settings.prompt_logprobs is not None and answer.model != self.model
            async with self._slots.place(scores):
                if self.cpu_build and self._slots.scoring and self.running > 1:
                    self._dead = True
                response = await self._answer(request, answer, cost_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return response

    def _prepare(self, body: Json, chat: bool, number: int) -> tuple[Answer, float]:
        """The whole answer, and the seconds before its first token."""
        name = body.get("model") or self.model
        self._check_model(str(name))
        prompts = read_prompts(body, chat, self.tokenizer, self.max_model_len)
        room = self.max_model_len - max(map(len, prompts))
        seed = body.get("seed") if isinstance(body.get("seed"), int) else None
        rng = random.Random(f"{self.seed} {number if seed is None else seed}")
        settings: Settings = read_settings(body, chat, self.tokenizer, room, rng, self.max_logprobs)
        if self.max_waiting is not None and self._slots.busy and self._slots.waiting >= self.max_waiting:
            raise RefusedError(REASONS[503], 503, "ServiceUnavailableError")
        if self._said:
            settings = saying(settings, *self._said.popleft(), self.tokenizer)
        policy = self.policy(str(name), anew=bool(settings.salt) or settings.prompt_logprobs is not None)
        first = rng.getrandbits(62) if settings.seed is None else settings.seed
        made = [
            [
                generate(policy, prompt, settings, first + place * settings.n + i, self.tokenizer, self.logprobs_mode)
                for i in range(settings.n)
            ]
            for place, prompt in enumerate(prompts)
        ]
        shown = prompts
        if self._misreported:
            self._misreported -= 1
            shown = [(*prompt[:-1], (prompt[-1] + 1) % self.tokenizer.vocabulary) for prompt in prompts]
        fresh = sum(self._cache.add(policy.weights, prompt, settings.salt) for prompt in prompts)
        answer = Answer(number, str(name), chat, settings, prompts, shown, made, self.tokenizer, policy, self.gives_ids)
        return answer, self.latency_s + fresh * self.per_prompt_token_s

    def _check_model(self, name: str) -> None:
        if self._dead:
            raise RefusedError(REASONS[500], 500, "InternalServerError")
        if name == self.model:
            return
        if name not in self._loaded:
            aliases = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise RefusedError(aliases, 404, "NotFoundError", "model")
        if not (Path(self._loaded[name].path) / "adapter_model.safetensors").is_file():
            # vLLM reads an evicted adapter again, and its engine does not survive that the files are gone
            self._dead = True
            raise RefusedError(REASONS[500], 500, "InternalServerError")

    async def _answer(self, request: web.BaseRequest, answer: Answer, cost_s: float) -> web.StreamResponse:
        await self._awake.wait()
        _, generated = answer.tokens
        await self._take(cost_s if answer.settings.stream else cost_s + generated * self.per_token_s)
        if self._dead:
            raise RefusedError(REASONS[500], 500, "InternalServerError")
        planned = await self._planned("generate", request, answer)
        if planned is not None:
            return planned
        if answer.settings.stream:
            response = await open_stream(request)
            for event in answer.events():
                await self._take(self.per_token_s)
                await response.write(event)
        else:
            response = web.json_response(answer.whole())
        self.answered += 1
        self._counters.add(answer)
        return response
