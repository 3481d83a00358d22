"""The policies in training: their settings, their history, and presets of groups."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coterie.types import AdapterVersion, ModelId, ModelRole, PlayerCard, SeatId, TaskType

__all__ = [
    "PRESETS",
    "LoRAModel",
    "ModelConfig",
    "ModelPerformance",
    "ModelRole",
    "create_competitive_models",
    "create_cooperative_team",
    "create_team_battle_models",
]


class ModelConfig(BaseModel):
    """One policy: who it is, what part it plays, and how its adapter learns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_id: str
    """Unique in the run; letters, digits, "_", "-" and ".". Names its adapters on disk and on servers."""
    model_name: str | None = None
    """Base model; None: the run's. All policies of a run share one base."""
    role: ModelRole = ModelRole.NEUTRAL
    lora_rank: int = Field(default=8, ge=1, le=512)
    """Rank of the adapter's matrices; models of one run may differ."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Adapter output is scaled by alpha / rank."""
    learning_rate: float = Field(default=8e-4, gt=0, le=1.0)
    """Of AdamW, per update; the default suits rank 8, a 135M base, short answers and some dozens of updates."""
    team_id: str | None = None
    """Models of one team share advice and, in a team battle, reward; None: on its own."""
    specialization: str = ""
    """Free text for the prompt: what this model is good at."""

    @field_validator("model_id")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
            raise ValueError("must be 1 to 64 letters, digits, '_', '-' or '.', starting with a letter or digit")
        return value


@dataclass(frozen=True, slots=True)
class ModelPerformance:
    """How one model did in one update, measured; means over its episodes of that update.

    `cooperation_score` is None until advice has been both delivered and withheld.
    """

    update: int
    model_id: ModelId
    accuracy: float
    efficiency: float
    score: float
    reward: float
    cooperation_score: float | None
    valid_rate: float
    entropy: float
    episodes: int
    by_task_type: dict[TaskType, float] = field(default_factory=dict)


@dataclass(slots=True)
class LoRAModel:
    """One trained policy: its settings, its current adapter version, and its history.

    The weights themselves are in the environment that trains it, and, once it saved them, in `adapter_dir`.
    """

    config: ModelConfig
    version: int = 0
    weight_updates: int = 0
    """Optimizer steps taken."""
    lora_adaptations: int = 0
    """Adapter versions published."""
    performance_history: list[ModelPerformance] = field(default_factory=list)
    adapter_dir: Path | None = None
    """Where the current version is saved, in PEFT format; None: nowhere yet."""

    @property
    def model_id(self) -> ModelId:
        return self.config.model_id

    @property
    def adapter(self) -> AdapterVersion:
        return AdapterVersion(self.config.model_id, self.version)

    def card(self, seat_id: SeatId) -> PlayerCard:
        """What a table knows of this model when it holds `seat_id`."""
        c = self.config
        return PlayerCard(seat_id, c.model_id, c.role, c.team_id, c.specialization)

    def stats(self) -> dict[str, Any]:
        """Its settings, counters and last measured figures, in JSON values."""
        last = self.performance_history[-1] if self.performance_history else None
        figures = ("accuracy", "efficiency", "score", "reward", "cooperation_score", "valid_rate", "entropy")
        return {
            "role": str(self.config.role),
            "team_id": self.config.team_id,
            "lora_rank": self.config.lora_rank,
            "learning_rate": self.config.learning_rate,
            "adapter": self.adapter.name,
            "weight_updates": self.weight_updates,
            "lora_adaptations": self.lora_adaptations,
            "last": {name: getattr(last, name) for name in figures} if last else None,
        }


def create_cooperative_team() -> list[ModelConfig]:
    """A leader and two followers."""
    return [
        ModelConfig(model_id="leader", role=ModelRole.LEADER, team_id="team", specialization="planning"),
        ModelConfig(model_id="follower_1", role=ModelRole.FOLLOWER, team_id="team", specialization="careful reading"),
        ModelConfig(model_id="follower_2", role=ModelRole.FOLLOWER, team_id="team", specialization="quick answers"),
    ]


def create_competitive_models() -> list[ModelConfig]:
    """Three competitors of different rank and learning rate."""
    return [
        ModelConfig(model_id="competitor_1", role=ModelRole.COMPETITOR, lora_rank=4, lora_alpha=8),
        ModelConfig(model_id="competitor_2", role=ModelRole.COMPETITOR, lora_rank=8, lora_alpha=16),
        ModelConfig(
            model_id="competitor_3", role=ModelRole.COMPETITOR, lora_rank=16, lora_alpha=32, learning_rate=4e-4
        ),
    ]


def create_team_battle_models() -> list[ModelConfig]:
    """Two teams of two teammates."""
    return [
        ModelConfig(model_id=f"{team}_{number}", role=ModelRole.TEAMMATE, team_id=team)
        for team in ("red", "blue")
        for number in (1, 2)
    ]


PRESETS = {
    "cooperative_team": create_cooperative_team,
    "competitive_models": create_competitive_models,
    "team_battle_models": create_team_battle_models,
}
