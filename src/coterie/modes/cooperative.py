"""Cooperative: all share their advice and their reward.

    reward of every seat = reward_pool * mean(scores) / n          (sum: reward_pool * mean(scores))

| speaker \\ listener | hears                                         |
|--------------------|-----------------------------------------------|
| anybody            | yes, where roles allow it (`coterie.modes.roles`) |

Nobody gains from another's loss, so the reward alone cannot tell a free rider from a worker: that is what
team-structured credit is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from coterie.modes.division import WithoutMemory, check_scores, pay
from coterie.modes.roles import may_advise
from coterie.types import PlayerCard, SeatId, TeamId, TrainingMode, TrainingTask


def shares(scores: Mapping[SeatId, float]) -> dict[SeatId, float]:
    """The same share for every seat; together they are the mean score."""
    return dict.fromkeys(scores, fmean(scores.values()) / len(scores))


class Cooperative(WithoutMemory):
    """One group, one reward."""

    name = TrainingMode.COOPERATIVE

    def hears(self, listener: PlayerCard, speaker: PlayerCard, task: TrainingTask) -> bool:
        return may_advise(listener, speaker)

    def rewards(
        self, task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
    ) -> dict[SeatId, float]:
        """Raises `ScenarioError` for a score outside [0, 1] or a seat without team entry."""
        return pay(task, shares(check_scores(task, scores, teams)))
