"""Dividing a reward pool: checked scores in, shares of the pool, rewards out.

Shares are non-negative and sum to at most 1; rewards are shares of `task.reward_pool` and sum, exactly rounded, to
at most the pool. Every sum here is exactly rounded (`math.fsum`), so the order of the seats cannot change a bit.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from coterie.errors import RunFolderError, ScenarioError
from coterie.types import Episode, SeatId, TeamId, TrainingMode, TrainingTask

SAME_SCORE_DIGITS = 12
"""Scores equal to this many decimals tie: means of equal scores may differ in their last bits."""


def check_scores(
    task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
) -> dict[SeatId, float]:
    """The scores as floats.

    Raises:
        ScenarioError: there are none, a score is not a number in [0, 1], or `teams` does not have the same seats.
    """
    if not scores:
        raise ScenarioError(
            f"task {task.task_id!r}: no seat has a score; the outcome of a play needs one for each seat"
        )
    for seat, score in scores.items():
        if not isinstance(score, Real) or not 0.0 <= score <= 1.0:
            raise ScenarioError(
                f"task {task.task_id!r}, seat {seat!r}: score {score!r} is not a number in [0, 1]; "
                f"the scenario must scale its scores"
            )
    strangers = scores.keys() ^ teams.keys()
    if strangers:
        seat = min(strangers)
        lacking, having = ("team entry", "score") if seat in scores else ("score", "team entry")
        raise ScenarioError(f"task {task.task_id!r}, seat {seat!r}: it has a {having} but no {lacking}")
    return {seat: float(score) for seat, score in scores.items()}


def rank_shares(values: Sequence[float]) -> list[float]:
    """Shares by rank with linear weights; ties share the mean weight of their places.

    Place r of n has weight n - r (so the last gets nothing), divided by the sum n (n - 1) / 2. That is the share of
    wins in a round robin: (those beaten + half of those tied with) / (n (n - 1) / 2). Equal values, zeros included,
    give equal shares. With nobody to be ranked against, the share is the value itself.
    """
    n = len(values)
    if n == 1:
        return [values[0]]
    rounded = [round(value, SAME_SCORE_DIGITS) for value in values]
    order = sorted(rounded)
    matches = n * (n - 1) / 2
    shares = []
    for value in rounded:
        beaten = bisect_left(order, value)
        tied = bisect_right(order, value) - beaten - 1
        shares.append((beaten + tied / 2) / matches)
    return shares


def pay(task: TrainingTask, shares: Mapping[SeatId, float]) -> dict[SeatId, float]:
    """Rewards of `shares` of the pool; their exactly rounded sum never exceeds it.

    Raises:
        ValueError: the shares sum to more than 1, beyond rounding: the mode that made them is wrong.
    """
    total = math.fsum(shares.values())
    if not total <= 1.0 + 1e-9:
        raise ValueError(f"task {task.task_id!r}: shares of the reward pool sum to {total}; a mode must divide it")
    rewards = {seat: task.reward_pool * share for seat, share in shares.items()}
    # Shares that sum to 1 may round to rewards a few units in the last place above the pool.
    while math.fsum(rewards.values()) > task.reward_pool:
        rewards = {seat: math.nextafter(reward, 0.0) for seat, reward in rewards.items()}
    return rewards


class WithoutMemory:
    """A mode that learns nothing from episodes."""

    name: TrainingMode

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Nothing to adapt."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises `RunFolderError` when there is anything to restore: it was saved by another mode."""
        if state:
            raise RunFolderError(
                f"the checkpoint holds mode state {sorted(state)}, but mode {self.name.value!r} has none; "
                f"resume with the mode the run was made with"
            )
