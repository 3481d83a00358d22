from __future__ import annotations

from enum import Enum

from openai import ChatCompletion as ChatCompletion
from pydantic import BaseModel, ConfigDict


class ChatCompletionMessage(BaseModel):
    model_config = ConfigDict(extra="allow")


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")


class ModelPlatformType(Enum):
    VLLM = "vllm"
    OTHER = "other"


class UnifiedModelType(str):
    pass
