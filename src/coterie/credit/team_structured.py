"""Team-structured credit: what a seat did itself, what its team did, and what all did, weighed.

    signal of a turn    = individual * own + team * mean score of its team + global * mean score of all seats
                          + reward_weight * n * reward / reward_pool
    own                 = the seat's own score; for an advice turn, the mean score of the other seats
    advantage of a turn = (signal - mean signal of the siblings at the same seat) / deviation

Shares weigh the scores of the outcome, before the mode divides anything; n is the number of seats, so that the
reward term is 1 for an equal share of the pool. A seat without a team is a team of one. Advice speaks for itself
through the others: its author's own answer is not its doing, and advice withheld in an episode gets nothing.

The baseline is relative at each level: the signal is linear, so subtracting its mean over siblings at a seat subtracts
from the own, the team's and the global part each its own mean. A team that always does well earns its members
nothing by that alone, only by doing better than it does on this task.

Sources: own and team reward mixed for collaborating policies, AT-GRPO (Zhao et al. 2025, arXiv 2510.11062); why the
reward of all is too noisy a signal for one, Wolpert & Tumer 2001 ("Optimal payoff functions for members of
collectives"); baseline and deviation as in `coterie.credit.group_relative`.

When it fails: the individual share makes free riding visible (a pure shared reward cannot), but it also breaks pure
sharing: where a seat gains by another's loss, it is paid for taking. In the prisoner's dilemma with payoffs 5/3/1/0
(scores 1, 0.6, 0.2, 0), shared reward and reward_weight 1, two of one team go on cooperating only while individual
is below 0.4; at the default 0.6 the equilibrium is three cooperators in four, without teams one in two. For social
dilemmas use `group_relative`, which knows the reward alone. The global share pays for a rival's success too; in a
team battle only the reward stands against that, and only while the rank is at stake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from coterie.credit.memory import refuse_state
from coterie.credit.relative import RelativeOptions, relative_advantages
from coterie.credit.turns import check_numbers
from coterie.types import Advantages, Episode, SeatId, TeamId


class TeamStructuredOptions(RelativeOptions):
    """How a seat's signal is put together; the three shares sum to 1."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    individual: float = Field(default=0.6, ge=0, le=1)
    """Weight of the seat's own score."""
    team: float = Field(default=0.2, ge=0, le=1)
    """Weight of its team's mean score."""
    global_: float = Field(default=0.2, ge=0, le=1, alias="global")
    """Weight of the mean score of all seats. Written "global" in a config."""
    reward_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the reward the mode gave, in equal shares of the pool; 0: scores alone."""

    @model_validator(mode="after")
    def _whole(self) -> TeamStructuredOptions:
        total = self.individual + self.team + self.global_
        if abs(total - 1.0) > 1e-6:
            raise ValueError(
                f"individual + team + global is {total:g} ({self.individual:g} + {self.team:g} + {self.global_:g}); "
                f"it must be 1"
            )
        return self


class TeamStructured:
    """Scores weighed by team structure, and the reward, against those of siblings at the same seat."""

    Options = TeamStructuredOptions

    def __init__(self, options: TeamStructuredOptions) -> None:
        self.options = options
        self._weights = (options.individual, options.team, options.global_, options.reward_weight)

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        """Raises `ScenarioError` for a missing or non-finite score or reward, or an episode id used twice."""
        return relative_advantages(episodes, self.signal, self.options)

    def signal(self, episode: Episode) -> tuple[dict[SeatId, float], dict[SeatId, float]]:
        """By seat, the number its other turns are judged by, and the number its advice turns are judged by.

        Raises `ScenarioError` for a missing or non-finite score or reward.
        """
        try:
            return self._signal(episode)
        except KeyError:
            check_numbers([episode])
            raise

    def _signal(self, episode: Episode) -> tuple[dict[SeatId, float], dict[SeatId, float]]:
        individual, of_team, of_all, of_reward = self._weights
        scores, rewards = episode.outcome.scores, episode.rewards
        n = len(episode.trajectories)
        if n == 0:
            return {}, {}
        total = math.fsum([scores[seat] for seat in episode.trajectories])
        members: dict[TeamId, list[float]] = {}
        for seat, trajectory in episode.trajectories.items():
            if trajectory.team is not None:
                members.setdefault(trajectory.team, []).append(scores[seat])

        everyone = of_all * total / n
        worth = of_reward * n / episode.task.reward_pool
        turns, advice = {}, {}
        for seat, trajectory in episode.trajectories.items():
            own = scores[seat]
            team = own
            if trajectory.team is not None:
                team = math.fsum(members[trajectory.team]) / len(members[trajectory.team])
            shared = of_team * team + everyone + worth * rewards[seat]
            turns[seat] = individual * own + shared
            advice[seat] = individual * ((total - own) / (n - 1) if n > 1 else own) + shared
        return turns, advice

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises `RunFolderError` when there is anything to restore."""
        refuse_state("team_structured", state)
