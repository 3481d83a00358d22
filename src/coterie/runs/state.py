"""The part of a checkpoint that is not tensors: made from a run's parts, checked against its config, and put back.

A run's config.toml may be edited between two processes: more updates, another learning rate. What the adapters were
trained as (which models, their ranks and scales, which layers) may not: the tensors would fit nothing, or mean
something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coterie.config import RunConfig
from coterie.credit.base import Credit
from coterie.errors import ConfigError
from coterie.models import LoRAModel
from coterie.modes.base import Mode
from coterie.rollout.calibration import Calibration
from coterie.runs.directory import RunDirectory
from coterie.types import ModelId


@dataclass(frozen=True, slots=True)
class Parts:
    """The settings of a run, and all of it that changes while it trains, weights and optimizers aside."""

    config: RunConfig
    models: Mapping[ModelId, LoRAModel]
    mode: Mode
    credit: Credit
    calibration: Calibration

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "mode": self.mode.state(),
            "credit": self.credit.state(),
            "calibration": self.calibration.to_json(),
            "models": {model_id: _model_state(model) for model_id, model in self.models.items()},
            **_adapted(self.config),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state()`; histories and adapters are not in it."""
        self.mode.restore(state["mode"])
        self.credit.restore(state["credit"])
        self.calibration.biases.update(Calibration.from_json(state["calibration"]).biases)
        for model_id, counters in state["models"].items():
            model = self.models[model_id]
            model.version = counters["version"]
            model.weight_updates = counters["weight_updates"]
            model.lora_adaptations = counters["lora_adaptations"]


def check_fits(run: RunDirectory, update: int, state: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming every setting in which a run's config no longer fits its checkpoint, with both
    values; `state` is that of the checkpoint after `update`."""
    problems = [f"{what} is {now}, in the checkpoint {then}" for what, now, then in _differences(run.config, state)]
    if problems:
        raise ConfigError(
            f"{run.path / 'config.toml'} no longer fits the checkpoint after update {update}: {'; '.join(problems)}; "
            "put the old values back, or start a new run"
        )


def _model_state(model: LoRAModel) -> dict[str, Any]:
    """What its adapter is, and how far it has come."""
    return {
        "version": model.version,
        "weight_updates": model.weight_updates,
        "lora_adaptations": model.lora_adaptations,
        "lora_rank": model.config.lora_rank,
        "lora_alpha": model.config.lora_alpha,
    }


def _adapted(config: RunConfig) -> dict[str, Any]:
    """Where adapters stand in the base."""
    return {"lora_targets": sorted(config.base.lora_targets), "lora_layers": config.base.lora_layers}


def _differences(config: RunConfig, state: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """(setting, its value now, its value then); what a checkpoint does not say counts as unchanged."""
    now, then = {model.model_id: model for model in config.models}, state["models"]
    if set(now) != set(then):
        yield "models", ", ".join(now) or "none", ", ".join(then)
    for name, value in _adapted(config).items():
        if state.get(name, value) != value:
            yield f"base.{name}", value, state[name]
    for model_id, model in now.items():
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(model, name)
            if then.get(model_id, {}).get(name, value) != value:
                yield f"{name} of model {model_id!r}", value, then[model_id][name]
