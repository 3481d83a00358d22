"""As much of the openai package as CAMEL's models and `coterie.inference.camel` use, over aiohttp."""

from __future__ import annotations

import copy
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict


class OpenAIError(Exception):
    pass


class APIConnectionError(OpenAIError):
    pass


class APITimeoutError(APIConnectionError):
    pass


class APIStatusError(OpenAIError):
    def __init__(self, response: Any) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


class _Response:
    def __init__(self, status: int, headers: Any, content: bytes) -> None:
        self.status_code, self.headers, self.content = status, headers, content


class ChatCompletion(BaseModel):
    model_config = ConfigDict(extra="allow")


class AsyncOpenAI:
    """`calls` are the options of every request, for tests to look at; copies share it."""

    def __init__(self, base_url: str, *, max_retries: int = 2, timeout: float = 600.0) -> None:
        self.base_url, self.options = base_url, {"max_retries": max_retries, "timeout": timeout}
        self.calls: list[dict[str, Any]] = []
        self.closed = False

    @property
    def chat(self) -> AsyncOpenAI:
        return self

    @property
    def completions(self) -> AsyncOpenAI:
        return self

    def with_options(self, **options: Any) -> AsyncOpenAI:
        other = copy.copy(self)
        other.options = {**self.options, **options}
        return other

    async def create(self, *, extra_body: dict[str, Any] | None = None, **body: Any) -> ChatCompletion:
        self.calls.append(self.options)
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{self.base_url}/chat/completions", json={**body, **(extra_body or {})}) as answer,
            ):
                content = await answer.read()
                if answer.status != 200:
                    raise APIStatusError(_Response(answer.status, answer.headers, content))
                return ChatCompletion.model_validate_json(content)
        except aiohttp.ClientError as error:
            raise APIConnectionError from error

    async def close(self) -> None:
        self.closed = True


class OpenAI:
    """The client of plain code; nothing here asks by it."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def close(self) -> None: ...
