"""Coterie co-trains several LLM policies, LoRA adapters on one shared base, in one shared environment."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.config import RunConfig, load_config
    from coterie.environment import MultiModelEnvironment
    from coterie.errors import CoterieError
    from coterie.inference.client import VLLMClient
    from coterie.models import (
        LoRAModel,
        ModelConfig,
        ModelPerformance,
        create_competitive_models,
        create_cooperative_team,
        create_team_battle_models,
    )
    from coterie.types import ModelRole, TaskType, TrainingMode, TrainingTask

__all__ = [
    "CoterieError",
    "LoRAModel",
    "ModelConfig",
    "ModelPerformance",
    "ModelRole",
    "MultiModelEnvironment",
    "RunConfig",
    "TaskType",
    "TrainingMode",
    "TrainingTask",
    "VLLMClient",
    "create_competitive_models",
    "create_cooperative_team",
    "create_team_battle_models",
    "load_config",
]

_HOME = {
    "CoterieError": "errors",
    "MultiModelEnvironment": "environment",
    "RunConfig": "config",
    "load_config": "config",
    "ModelRole": "types",
    "TaskType": "types",
    "TrainingMode": "types",
    "TrainingTask": "types",
    "VLLMClient": "inference.client",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    return getattr(import_module(f"coterie.{_HOME.get(name, 'models')}"), name)


def __dir__() -> list[str]:
    return __all__
