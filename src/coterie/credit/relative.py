"""Advantages relative to siblings: the engine of `group_relative` and `team_structured`.

Every credited turn is judged by a number (`Signal`). Turns that can be compared form a pool: those of one
(group, seat), advice apart from other turns, or, `by_state`, those of them with the same prompt. A turn's advantage
is its number minus the pool's mean, then scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from coterie.credit.base import CreditOptions
from coterie.credit.normalize import inverse_deviation, mean
from coterie.credit.turns import check_numbers, collect, credited, divide_per_policy
from coterie.types import ADVICE, Advantages, Episode, ModelId, SeatId

Signal = Callable[[Episode], tuple[Mapping[SeatId, float], Mapping[SeatId, float]]]
"""Of an episode, by seat: what its other turns are judged by, and what its advice turns are judged by."""


class RelativeOptions(CreditOptions):
    """How siblings are compared."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """Of all siblings, itself included (GRPO), or of the others only, which is unbiased (RLOO)."""
    by_state: bool = False
    """Whether turns are compared with siblings at the same prompt, where there are at least two (AT-GRPO)."""
    normalize: Literal["none", "group", "policy"] = "policy"
    """What advantages are divided by: nothing (Dr. GRPO), the deviation of the siblings' numbers (GRPO), or the
    deviation of all advantages of the policy in the batch (Dr. MAS). Below 1e-6 the advantages are 0."""


class _Pool:
    """The numbers of comparable turns; one for each sibling."""

    __slots__ = ("factor", "mean", "values")

    def __init__(self) -> None:
        self.values: list[float] = []
        self.mean = 0.0
        self.factor = 0.0

    def settle(self, options: RelativeOptions) -> None:
        n = len(self.values)
        self.mean = mean(self.values)
        self.factor = 1.0
        if options.baseline == "leave_one_out":
            # x - mean of the others = (x - mean of all) * n / (n - 1); alone there is nothing to compare with.
            self.factor = n / (n - 1) if n > 1 else 0.0
        if options.normalize == "group":
            self.factor *= inverse_deviation(self.values)


_Key = tuple[str, SeatId, bool, tuple[int, ...] | None]
_NOWHERE = _Pool()
"""Of turns that are not credited: whatever their number, the advantage is 0."""


def relative_advantages(episodes: Sequence[Episode], signal: Signal, options: RelativeOptions) -> Advantages:
    """One advantage per turn; the same whatever the order of `episodes`.

    Raises:
        ScenarioError: a score or reward is missing or not finite, or an episode id is used twice.
    """
    by_state = options.by_state
    pools: dict[_Key, _Pool] = {}
    numbers: list[float] = []
    joined: list[_Pool] = []
    at_state: list[_Pool] = []
    models: list[ModelId | None] = []
    for episode in episodes:
        judged = signal(episode)
        for seat, trajectory in episode.trajectories.items():
            mine: dict[_Key, _Pool] = {}
            for turn in trajectory.turns:
                if not credited(turn, episode):
                    numbers.append(0.0)
                    joined.append(_NOWHERE)
                    at_state.append(_NOWHERE)
                    models.append(None)
                    continue
                advice = turn.kind == ADVICE
                number = judged[advice].get(seat, math.nan)
                numbers.append(number)
                joined.append(_join(pools, mine, (episode.group, seat, advice, None), number))
                if by_state:
                    at_state.append(_join(pools, mine, (episode.group, seat, advice, turn.prompt_ids), number))
                models.append(turn.model_id)
    if not all(map(math.isfinite, numbers)):
        check_numbers(episodes)
    for pool in pools.values():
        pool.settle(options)
    if by_state:
        joined = [s if len(s.values) > 1 else p for s, p in zip(at_state, joined, strict=True)]
    advantages = [(number - pool.mean) * pool.factor for number, pool in zip(numbers, joined, strict=True)]
    if options.normalize == "policy":
        advantages = divide_per_policy(advantages, models)
    return collect(episodes, advantages)


def _join(pools: dict[_Key, _Pool], mine: dict[_Key, _Pool], key: _Key, number: float) -> _Pool:
    """The pool of `key`, which holds `number` once for each trajectory; `mine` are those this one is in."""
    pool = mine.get(key)
    if pool is None:
        pool = pools.get(key)
        if pool is None:
            pool = pools[key] = _Pool()
        pool.values.append(number)
        mine[key] = pool
    return pool
