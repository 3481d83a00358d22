"""The part of a checkpoint that is not tensors, and whether a config still fits it.

A run's config.toml may be edited between two processes: more updates, another learning rate. What the adapters were
trained as (which models, their ranks and scales, which layers) may not: the tensors would fit nothing, or mean
something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coterie.config import RunConfig
from coterie.errors import ConfigError
from coterie.models import LoRAModel
from coterie.runs.directory import RunDirectory
from coterie.types import ModelId


def models_state(models: Mapping[ModelId, LoRAModel]) -> dict[str, Any]:
    """Of every model, what its adapter is and how far it has come."""
    return {
        model_id: {
            "version": model.version,
            "weight_updates": model.weight_updates,
            "lora_adaptations": model.lora_adaptations,
            "lora_rank": model.config.lora_rank,
            "lora_alpha": model.config.lora_alpha,
        }
        for model_id, model in models.items()
    }


def adapted_layers(config: RunConfig) -> dict[str, Any]:
    """Where adapters stand in the base."""
    return {"lora_targets": sorted(config.base.lora_targets), "lora_layers": config.base.lora_layers}


def check_fits(run: RunDirectory, update: int, state: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming every setting in which a run's config no longer fits its checkpoint, with both
    values; `state` is that of the checkpoint after `update`."""
    problems = [f"{what} is {now}, in the checkpoint {then}" for what, now, then in _differences(run.config, state)]
    if problems:
        raise ConfigError(
            f"{run.path / 'config.toml'} no longer fits the checkpoint after update {update}: {'; '.join(problems)}; "
            "put the old values back, or start a new run"
        )


def _differences(config: RunConfig, state: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """(setting, its value now, its value then); what a checkpoint does not say counts as unchanged."""
    now, then = {model.model_id: model for model in config.models}, state["models"]
    if set(now) != set(then):
        yield "models", ", ".join(now) or "none", ", ".join(then)
    for name, value in adapted_layers(config).items():
        if state.get(name, value) != value:
            yield f"base.{name}", value, state[name]
    for model_id, model in now.items():
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(model, name)
            if then.get(model_id, {}).get(name, value) != value:
                yield f"{name} of model {model_id!r}", value, then[model_id][name]
