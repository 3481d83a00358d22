"""Competitive: each plans alone, and rank decides.

    reward of a seat = reward_pool * (seats beaten + seats tied with / 2) / (n (n - 1) / 2)        (sum: reward_pool)

These are linear weights n - rank, ties sharing the mean weight of their places: with two seats the better takes all,
with three the shares are 2/3, 1/3, 0. Only the order of the scores counts. When all scores are equal, all zero
included, nobody earned more than another and the shares are equal: the reward then carries no information. One seat
alone has nobody to beat and gets reward_pool * score.

Nobody hears anybody, whatever the roles and teams.
"""

from __future__ import annotations

from collections.abc import Mapping

from coterie.modes.division import WithoutMemory, check_scores, pay, rank_shares
from coterie.types import PlayerCard, SeatId, TeamId, TrainingMode, TrainingTask


def shares(scores: Mapping[SeatId, float]) -> dict[SeatId, float]:
    """Shares by rank; they sum to 1 with two seats or more."""
    return dict(zip(scores, rank_shares(list(scores.values())), strict=True))


class Competitive(WithoutMemory):
    """Everybody for themselves."""

    name = TrainingMode.COMPETITIVE

    def hears(self, listener: PlayerCard, speaker: PlayerCard, task: TrainingTask) -> bool:
        return False

    def rewards(
        self, task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
    ) -> dict[SeatId, float]:
        """Raises `ScenarioError` for a score outside [0, 1] or a seat without team entry."""
        return pay(task, shares(check_scores(task, scores, teams)))
