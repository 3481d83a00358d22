"""What a training mode decides: who hears whom, and how scores become rewards.

Invariants: the rewards of an episode sum to at most `task.reward_pool`; permuting seats permutes rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from coterie.errors import ConfigError
from coterie.registry import resolve
from coterie.types import Episode, PlayerCard, SeatId, TeamId, TrainingMode, TrainingTask


class Mode(Protocol):
    name: TrainingMode

    def hears(self, listener: PlayerCard, speaker: PlayerCard, task: TrainingTask) -> bool:
        """Whether advice of `speaker` may reach `listener` (never itself)."""
        ...

    def rewards(
        self, task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
    ) -> dict[SeatId, float]:
        """Divide `task.reward_pool` by scores in [0, 1]. `teams` has every seat; None: on its own."""
        ...

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Look at the episodes of a finished update; MIXED adapts its blend here, the others do nothing."""
        ...

    def state(self) -> dict[str, Any]:
        """What must be saved to go on exactly (JSON values)."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


MODES = {
    "cooperative": "coterie.modes.cooperative:Cooperative",
    "competitive": "coterie.modes.competitive:Competitive",
    "team_battle": "coterie.modes.team_battle:TeamBattle",
    "mixed": "coterie.modes.mixed:Mixed",
}


def build_mode(mode: TrainingMode, custom: str | None = None) -> Mode:
    """The mode of that name, or one of the user's own that goes by it.

    Args:
        custom: "module:attr" or an installed entry point; a class without arguments whose `name` is `mode`.

    Raises:
        ConfigError: there is no such class, or it goes by another name.
    """
    built: Mode = resolve("mode", mode.value if custom is None else custom, MODES)()
    if built.name != mode:
        raise ConfigError(
            f"custom_mode {custom!r} goes by {built.name!s} (its `name`), which decides prompts and credit; "
            f"set mode = {str(built.name)!r} too"
        )
    return built
