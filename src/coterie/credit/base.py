"""What a credit scheme does: rewards of episodes in, one advantage per turn out; only its own state changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from coterie.config import CreditConfig, explain
from coterie.errors import ConfigError
from coterie.registry import resolve
from coterie.types import Advantages, Episode, TrainingMode


class CreditOptions(BaseModel):
    """Base of a scheme's own settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Credit(Protocol):
    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        """One advantage for every turn of every trajectory of `episodes`, in any order of the episodes."""
        ...

    def state(self) -> dict[str, Any]:
        """What must be saved to go on exactly (JSON values)."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Magnet:
    """What a scheme asks the learner to hold every policy near; weights are in units of an advantage per nat."""

    strength: float
    """Weight of KL(policy || magnet); the magnet is a copy that follows the policy."""
    proximal: float
    """Weight of KL(policy || policy before the update)."""
    every: int
    """Updates between moves of the magnet; 0: it never moves."""
    rate: float
    """Share of the way to the policy's weights that a move goes, in (0, 1]."""
    final: float | None = None
    """`strength` at the last update, which it falls to geometrically; None: it stays."""

    def strength_at(self, done: float) -> float:
        """`strength` when the share `done` of all updates lies behind."""
        if self.final is None or self.strength == 0.0:
            return self.strength
        return self.strength * math.exp(math.log(self.final / self.strength) * min(1.0, done))


@runtime_checkable
class Magnetised(Protocol):
    """A scheme whose learner holds every policy near a magnet."""

    @property
    def magnet(self) -> Magnet: ...


SCHEMES = {
    "group_relative": "coterie.credit.group_relative:GroupRelative",
    "magnetic": "coterie.credit.magnetic:Magnetic",
    "moving_average": "coterie.credit.moving_average:MovingAverage",
    "team_structured": "coterie.credit.team_structured:TeamStructured",
}

FITTING = {
    TrainingMode.COOPERATIVE: "team_structured",
    TrainingMode.COMPETITIVE: "group_relative",
    TrainingMode.TEAM_BATTLE: "team_structured",
    TrainingMode.MIXED: "group_relative",
}
"""The scheme "auto" stands for."""


def build_credit(config: CreditConfig, mode: TrainingMode) -> Credit:
    """Raises `ConfigError` for an unknown scheme or option."""
    name = FITTING[mode] if config.scheme == "auto" else config.scheme
    scheme = resolve("credit", name, SCHEMES)
    try:
        built: Credit = scheme(scheme.Options.model_validate(config.options))
    except ValidationError as error:
        raise ConfigError(f"credit {name!r}, options: {explain(error, scheme.Options)}") from error
    return built
