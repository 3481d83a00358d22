"""The HTTP side: routes, keys, bodies, errors, streams.

    request ──► key? ──► JSON? ──► Job ──► lease of the adapter ──► admitted ──► reply, or events as they come

A client that goes away ends its generation: the server cancels the handler, and everything below unwinds.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from aiohttp import web

from coterie.errors import CoterieError
from coterie.serve.chat import ChatJob
from coterie.serve.completions import CompletionJob
from coterie.serve.engine import NothingAllowedError, TokenEngine
from coterie.serve.errors import ApiError, busy, failed, rejected
from coterie.serve.metrics import CONTENT_TYPE
from coterie.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
    parse,
)
from coterie.serve.service import Job, Service
from coterie.serve.settings import ServeSettings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SERVICE = web.AppKey("service", Service)
_OPEN = frozenset({"/health", "/ping", "/version", "/metrics"})
"""Answered without a key: what load balancers and scrapers ask."""
_DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


def build_app(engine: TokenEngine, settings: ServeSettings) -> web.Application:
    """The server as an aiohttp application; `app[SERVICE]` is what its requests share.

    The engine is the caller's to close.
    """
    app = web.Application(middlewares=[_errors, _key(settings.api_key)], client_max_size=settings.max_body_bytes)
    app[SERVICE] = Service(engine, settings)
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/ping", _health),
            web.get("/version", _version),
            web.get("/metrics", _metrics),
            web.get("/v1/models", _models),
            web.post("/v1/chat/completions", _chat),
            web.post("/v1/completions", _completions),
            web.post("/v1/load_lora_adapter", _load_adapter),
            web.post("/v1/unload_lora_adapter", _unload_adapter),
            web.post("/tokenize", _tokenize),
            web.post("/detokenize", _detokenize),
        ]
    )
    app.on_cleanup.append(_close)
    return app


async def _close(app: web.Application) -> None:
    await app[SERVICE].adapters.close()


# -- around every request ---------------------------------------------------------------------------------------------


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        kept = {name: value for name, value in error.headers.items() if name == "Allow"}
        return _error(ApiError(error.status, _said(error), HTTPStatus(error.status).phrase, headers=kept))
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except Exception as error:  # noqa: BLE001 - every failure has an answer; the unforeseen ones leave their trace
        return _error(_as_api_error(error))


def _as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NothingAllowedError):
        return rejected(str(error))
    if isinstance(error, RecursionError):
        return rejected("The request is nested too deeply.")
    if isinstance(error, CoterieError):
        _log.error("request failed: %s", error)
        return failed(str(error))
    _log.error("request failed", exc_info=error)
    return failed("Internal server error")


def _said(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return f"The request is larger than this server takes. {error.text}"
    return error.reason


def _error(error: ApiError) -> web.Response:
    return web.json_response(error.body, status=error.status, headers=error.headers)


def _key(api_key: str | None) -> Any:
    """Middleware that lets nobody in without the key."""
    wanted = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if wanted is not None and request.path not in _OPEN:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            # digests of equal length, compared in constant time: nothing about the key can be learnt from the clock
            right = hmac.compare_digest(hashlib.sha256(given.encode()).digest(), wanted)
            if not right or scheme.lower() != "bearer":
                return web.json_response({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)
        return await handler(request)

    return check


async def _json(request: web.Request) -> Any:
    """The body as data. Only JSON that says so: a web page of somebody else cannot send that without being asked."""
    if request.content_type != "application/json":
        raise rejected("Unsupported Media Type: Only 'application/json' is allowed")
    body = await request.read()
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise rejected(f"The body is not valid JSON: {error}") from error


# -- generation -------------------------------------------------------------------------------------------------------


async def _chat(request: web.Request) -> web.StreamResponse:
    body = parse(ChatBody, await _json(request))
    service = request.app[SERVICE]
    return await _respond(request, service, ChatJob(service, body, _request_id(request, body.request_id)))


async def _completions(request: web.Request) -> web.StreamResponse:
    body = parse(CompletionBody, await _json(request))
    service = request.app[SERVICE]
    return await _respond(request, service, CompletionJob(service, body, _request_id(request, body.request_id)))


def _request_id(request: web.Request, given: str | None) -> str:
    return (request.headers.get("X-Request-Id") or given or uuid.uuid4().hex)[:128]


async def _respond(request: web.Request, service: Service, job: Job) -> web.StreamResponse:
    model = job.body.model
    with service.adapters.lease(model) as adapter, service.admitted(job.sequences):
        await job.prepare(adapter)
        with service.metrics.following([answer for _, answer in job.answers], model if adapter else None):
            if not job.body.stream:
                return web.json_response(await job.whole())
            return await _events(request, job)


async def _events(request: web.Request, job: Job) -> web.StreamResponse:
    """Server-sent events. The status has been sent when something fails later, so the error is an event."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )
    await response.prepare(request)
    try:
        async with aclosing(job.events()) as events:
            async for event in events:
                await response.write(_sse(event))
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except Exception as error:  # noqa: BLE001 - as in `_errors`
        await response.write(_sse(_as_api_error(error).body))
    await response.write(_DONE)
    await response.write_eof()
    return response


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


# -- adapters ---------------------------------------------------------------------------------------------------------


async def _load_adapter(request: web.Request) -> web.Response:
    body = parse(LoadAdapterBody, await _json(request))
    adapters = request.app[SERVICE].adapters
    said = await adapters.load(body.lora_name, body.lora_path, int(time.time()), in_place=body.load_inplace)
    return web.Response(text=said)


async def _unload_adapter(request: web.Request) -> web.Response:
    body = parse(UnloadAdapterBody, await _json(request))
    return web.Response(text=await request.app[SERVICE].adapters.unload(body.lora_name))


# -- the rest ---------------------------------------------------------------------------------------------------------


async def _health(request: web.Request) -> web.Response:
    if request.app[SERVICE].draining:
        raise busy("The server is shutting down.", retry_after_s=10)
    return web.Response()


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": version("coterie"), "server": "coterie"})


async def _metrics(request: web.Request) -> web.Response:
    body = request.app[SERVICE].metrics.exposition()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


async def _models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    settings = service.settings
    cards = [_card(settings.model, service.started, settings.root, None, service.context)]
    cards += [_card(one.name, one.created, one.path, settings.model, None) for one in service.adapters.loaded]
    return web.json_response({"object": "list", "data": cards})


def _card(name: str, created: int, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "coterie",
        "root": root,
        "parent": parent,
        "max_model_len": length,
        "permission": [],
    }


async def _tokenize(request: web.Request) -> web.Response:
    body = parse(TokenizeBody, await _json(request))
    service = request.app[SERVICE]
    service.adapters.known(body.model)
    if body.messages is not None:
        text = service.text.render(
            body.messages,
            tools=None if body.tools is None else [tool.model_dump() for tool in body.tools],
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
        )
        ids = service.text.encode(text, special=bool(body.add_special_tokens))
    else:
        ids = service.text.encode(body.prompt or "", special=body.add_special_tokens is not False)
    names = service.text.tokenizer.convert_ids_to_tokens(list(ids)) if body.return_token_strs else None
    return web.json_response(
        {"count": len(ids), "max_model_len": service.context, "tokens": list(ids), "token_strs": names}
    )


async def _detokenize(request: web.Request) -> web.Response:
    body = parse(DetokenizeBody, await _json(request))
    service = request.app[SERVICE]
    service.adapters.known(body.model)
    if any(token >= service.engine.vocabulary for token in body.tokens):
        raise rejected(f"tokens must be below the vocabulary size {service.engine.vocabulary}", "tokens")
    return web.json_response({"prompt": service.text.decode(body.tokens)})
