"""Moving-average credit: how much better than usual a seat did (role-conditioned advantage estimation).

    advantage of a turn = reward - b[task type, seat]           b as it was before this batch
    then                  b <- b + (1 - decay) * (mean reward of the batch at that key - b)

One baseline for every (task type, seat), advice turns apart from the others, shared by all models that ever hold the
seat. It is the seat that has an edge (the first mover, the one with more information), so the seat's usual reward is
no merit; in zero-sum games, where the mean over all seats is constant, this is what leaves a signal. The baseline is
that from before the batch: one that held the batch's own rewards would take part of every reward back. The first
batch of a key has no past: `initial`, or, None, the batch's own mean, so that the first advantages are centred.

Source: SPIRAL, Liu et al. 2025 (arXiv 2506.24119), which updates after every episode; here once a batch, so that
the order of a batch's episodes does not matter.

When it fails: it does not know how hard a task is, so easy tasks count as merit and hard ones as failure, and tasks
of one type with different reward pools are mixed; with siblings at hand `group_relative` has less variance. While
the policies improve fast the baseline lags and everything looks good; lower `decay` then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from coterie.credit.base import CreditOptions
from coterie.credit.normalize import mean
from coterie.credit.turns import check_numbers, collect, credited, divide_per_policy
from coterie.errors import RunFolderError
from coterie.types import ADVICE, Advantages, Episode, ModelId, SeatId, TaskType

_Key = tuple[TaskType, SeatId, str]


class MovingAverageOptions(CreditOptions):
    """How long the baseline remembers."""

    decay: float = Field(default=0.95, ge=0, lt=1)
    """Of the baseline, per batch: it looks back about 1 / (1 - decay) batches."""
    initial: float | None = Field(default=None, allow_inf_nan=False)
    """Baseline before the first batch, in reward units; None: the mean of the first batch."""
    normalize: Literal["none", "policy"] = "none"
    """Whether advantages are divided by the deviation of all advantages of the policy in the batch; below 1e-6
    they are 0. They are not centred: being better than usual on the whole is a signal here."""


class MovingAverage:
    """Rewards against the moving average of their seat."""

    Options = MovingAverageOptions

    def __init__(self, options: MovingAverageOptions) -> None:
        self.options = options
        self._baselines: dict[_Key, float] = {}

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        """Advantages under the baselines so far, which then take in `episodes`: call once for each batch.

        Raises `ScenarioError` for a missing or non-finite reward, or an episode id used twice; the baselines then
        stay as they were.
        """
        keys: list[_Key | None] = []
        numbers: list[float] = []
        models: list[ModelId | None] = []
        seen: dict[_Key, list[float]] = {}
        for episode in episodes:
            for seat, trajectory in episode.trajectories.items():
                reward = episode.rewards.get(seat, math.nan)
                entered = set()
                for turn in trajectory.turns:
                    if not credited(turn, episode):
                        keys.append(None)
                        numbers.append(0.0)
                        models.append(None)
                        continue
                    key = (episode.task.task_type, seat, ADVICE if turn.kind == ADVICE else "other")
                    if key not in entered:
                        entered.add(key)
                        seen.setdefault(key, []).append(reward)
                    keys.append(key)
                    numbers.append(reward)
                    models.append(turn.model_id)
        if not all(map(math.isfinite, numbers)):
            check_numbers(episodes)

        means = {key: mean(rewards) for key, rewards in seen.items()}
        before: dict[_Key | None, float] = {key: self._before(key, batch) for key, batch in means.items()}
        before[None] = 0.0
        advantages = [number - before[key] for number, key in zip(numbers, keys, strict=True)]
        if self.options.normalize == "policy":
            advantages = divide_per_policy(advantages, models)
        result = collect(episodes, advantages)
        for key, batch in means.items():
            self._baselines[key] = before[key] + (1.0 - self.options.decay) * (batch - before[key])
        return result

    def _before(self, key: _Key, batch: float) -> float:
        if key in self._baselines:
            return self._baselines[key]
        return batch if self.options.initial is None else self.options.initial

    def state(self) -> dict[str, Any]:
        """``{"baselines": [[task type, seat, "advice" or "other", baseline], ...]}``, sorted."""
        keys = sorted(self._baselines)
        return {"baselines": [[task.value, seat, kind, self._baselines[task, seat, kind]] for task, seat, kind in keys]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. Raises `RunFolderError` for anything else."""
        try:
            restored = {(TaskType(task), str(seat), str(kind)): value for task, seat, kind, value in state["baselines"]}
            valid = all(math.isfinite(value) for value in restored.values())
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"the checkpoint's state of credit scheme 'moving_average' cannot be read ({error!r}); "
                f"resume with the credit scheme the run was made with, or from an earlier checkpoint"
            ) from error
        if not valid:
            raise RunFolderError("the checkpoint's moving-average baselines are not all finite; use an earlier one")
        self._baselines = restored
