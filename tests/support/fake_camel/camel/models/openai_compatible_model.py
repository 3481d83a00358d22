from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI, OpenAI

from camel.models.base_model import BaseModelBackend


class OpenAICompatibleModel(BaseModelBackend):
    """Its settings stand on the object and go into every call, as in CAMEL."""

    def __init__(self, model_type: str, model_config_dict: dict[str, Any] | None, url: str | None) -> None:
        self.model_type, self.model_config_dict, self._url = model_type, dict(model_config_dict or {}), url
        self._client = OpenAI(url or "")
        self._async_client = AsyncOpenAI(url or "")

    async def arun(self, messages: list[Any], response_format: Any = None, tools: Any = None) -> Any:
        more = {"tools": tools} if tools else {}
        return await self._async_client.chat.completions.create(
            messages=messages, model=str(self.model_type), **self.model_config_dict, **more
        )
