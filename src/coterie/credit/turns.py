"""Which turns are credited, by what number; the same for every scheme.

A turn is credited when a model in training sampled it on a real engine (`Turn.trainable`) and it could matter: advice
withheld in its episode reached nobody. Every other turn has advantage 0 and counts in no baseline and no deviation.

A trajectory is one sample of its seat's result, however many turns it has: baselines are means over siblings, as in
GRPO, so long episodes do not weigh more. Advice and other turns are compared apart, because a scheme may judge them
by different numbers and because withheld advice is missing among the first.

Schemes work on flat lists, one entry for every turn in the order episodes, seats, turns; `collect` folds them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

from coterie.credit.normalize import inverse_deviation
from coterie.errors import ScenarioError
from coterie.types import ADVICE, Advantages, Episode, ModelId, SeatId, Turn


def credited(turn: Turn, episode: Episode) -> bool:
    """Whether `turn` may get an advantage other than 0."""
    return turn.trainable and not (turn.kind == ADVICE and turn.seat_id in episode.withheld)


def check_numbers(episodes: Sequence[Episode]) -> None:
    """Raises `ScenarioError` naming episode and seat where a score or reward is missing or not finite."""
    for episode in episodes:
        for seat in episode.trajectories:
            _check(episode, episode.outcome.scores, seat, "score", "the scenario must score every seat")
            _check(episode, episode.rewards, seat, "reward", "the mode must reward every seat")


def _check(episode: Episode, numbers: Mapping[SeatId, float], seat: SeatId, what: str, remedy: str) -> None:
    value = numbers.get(seat)
    if value is None or not math.isfinite(value):
        raise ScenarioError(f"episode {episode.episode_id!r}, seat {seat!r}: {what} is {value!r}; {remedy}")


def divide_per_policy(advantages: Sequence[float], models: Sequence[ModelId | None]) -> list[float]:
    """Each policy's advantages divided by their deviation over the batch; all 0 where that is below 1e-6.

    They are divided but not centred: baselines have done that, and moving all of a policy's advantages would give a
    gradient to groups in which nothing differed.

    Args:
        models: whose turn each is; None: not credited, counts in no deviation and gets 0.
    """
    of_model: dict[ModelId, list[float]] = {}
    for advantage, model_id in zip(advantages, models, strict=True):
        if model_id is not None:
            of_model.setdefault(model_id, []).append(advantage)
    scale: dict[ModelId | None, float] = {m: inverse_deviation(values) for m, values in of_model.items()}
    scale[None] = 0.0
    return [advantage * scale[model_id] for advantage, model_id in zip(advantages, models, strict=True)]


def collect(episodes: Sequence[Episode], flat: Sequence[float]) -> Advantages:
    """Fold one number for every turn back. Raises `ScenarioError` when two episodes share an id."""
    numbers = iter(flat)
    values = {
        episode.episode_id: {
            seat: tuple(islice(numbers, len(trajectory.turns))) for seat, trajectory in episode.trajectories.items()
        }
        for episode in episodes
    }
    if len(values) != len(episodes):
        ids = [episode.episode_id for episode in episodes]
        double = min(i for i in values if ids.count(i) > 1)
        raise ScenarioError(f"episode id {double!r} occurs {ids.count(double)} times in one batch; ids must be unique")
    return Advantages(values)
