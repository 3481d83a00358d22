from __future__ import annotations

from typing import Any

from camel.models.base_model import BaseModelBackend as BaseModelBackend
from camel.models.openai_compatible_model import OpenAICompatibleModel
from camel.types import ModelPlatformType


class StubModel(BaseModelBackend):
    """A model that asks nobody."""


class ModelFactory:
    @staticmethod
    def create(
        model_platform: ModelPlatformType,
        model_type: str,
        model_config_dict: dict[str, Any] | None = None,
        *,
        url: str | None = None,
        token_counter: Any = None,
        max_retries: int = 3,
    ) -> BaseModelBackend:
        if model_platform is ModelPlatformType.VLLM:
            return OpenAICompatibleModel(model_type, model_config_dict, url)
        return StubModel()
