"""Group-relative credit: how much better than its siblings a seat did.

    advantage of a turn = (reward - mean reward of the siblings at the same seat) / deviation

Siblings are the episodes of one group: the same task from the same start. Each (group, seat) has its own mean, so an
easier seat or task is nobody's merit. Options (`RelativeOptions`): the baseline with or without the turn's own
episode, comparison by turn state, and what the advantages are divided by.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); leave-one-out, Ahmadian et al. 2024 (RLOO, arXiv 2402.14740);
no division, Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783); deviation per policy, Feng et al. 2026 (Dr. MAS, arXiv
2602.08847), of which we take the deviation only (see `coterie.credit.turns`); grouping by turn state, Zhao et al. 2025
(AT-GRPO, arXiv 2510.11062).

When it fails: a group of one has no siblings and teaches nothing, nor does a group whose rewards are all equal (all
right, all wrong, or a competition that always ends in a tie); use `moving_average` there. In one group every seat's
reward moves with what the other seats did, so in large groups of models most of the difference is others' doing:
`team_structured` separates it. `by_state` throws comparisons away when prompts rarely repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coterie.credit.memory import refuse_state
from coterie.credit.relative import RelativeOptions, relative_advantages
from coterie.types import Advantages, Episode, SeatId


class GroupRelative:
    """Rewards against those of siblings at the same seat."""

    Options = RelativeOptions

    def __init__(self, options: RelativeOptions) -> None:
        self.options = options

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        """Raises `ScenarioError` for a missing or non-finite reward, or an episode id used twice."""
        return relative_advantages(episodes, _rewards, self.options)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises `RunFolderError` when there is anything to restore."""
        refuse_state("group_relative", state)


def _rewards(episode: Episode) -> tuple[Mapping[SeatId, float], Mapping[SeatId, float]]:
    """Advice and other turns alike are judged by the seat's reward."""
    return episode.rewards, episode.rewards
