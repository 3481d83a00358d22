"""Mixed: every task blends cooperation and competition by its cooperation_level; the blend adapts while training.

    reward = b * cooperative + (1 - b) * rivalry         rivalry: team_battle with two teams or more (a seat without
                                                         team is a team of one), competitive inside a single team

The blend b starts at the task's cooperation_level c and moves with measured learning progress, per task type:

    m        mean over an update's episodes of the mean score of all seats
    fast     <- fast + 0.20 (m - fast)       slow <- slow + 0.05 (m - slow)       both start at the first m
    progress  = fast - slow                  how much better the group does now than it used to
    stall     = clip(1 - progress / 0.05, 0, 1)       0 while it learns well, 1 when it stands still or falls back
    evidence  = 1 - 0.95^(updates - 1)       0 after the first update: standing still shows only over time
    b         = c + min(0.1, c, 1 - c) * evidence * stall * (1 - fast)

A group that is stuck while it does badly gets more of the shared reward, which pays a seat for what lifts others
too; once it learns, or does well, the blend returns to c. The shift never leaves c ± 0.1, and dies out towards
c = 0 and c = 1, which stay pure, so cooperation_level keeps its meaning. The score itself, before any mode divides
it, is what progress is measured on: a blend cannot look better by paying more.

Progress as the difference of a fast and a slow average of performance: Oudeyer & Kaplan 2007 ("What is intrinsic
motivation?", learning progress); Matiisen et al. 2017 ("Teacher-student curriculum learning"), who pick tasks by it.

| speaker and listener                               | hears, where roles allow it (`coterie.modes.roles`) |
|----------------------------------------------------|-----------------------------------------------------|
| of one team                                        | yes                                                 |
| leader and follower, one or both without a team    | yes: it is its leader                               |
| of different teams, or one or both without a team  | when b > 0.5                                        |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from coterie.errors import RunFolderError, ScenarioError
from coterie.modes import competitive, cooperative, team_battle
from coterie.modes.division import check_scores, pay
from coterie.modes.roles import leads, may_advise, same_team
from coterie.types import Episode, PlayerCard, SeatId, TaskType, TeamId, Tier, TrainingMode, TrainingTask

MAX_SHIFT = 0.1
"""Furthest the blend goes from a task's cooperation_level."""
HEARING_BLEND = 0.5
"""Above it, those who share no team hear each other."""
FAST_DECAY = 0.8
SLOW_DECAY = 0.95
"""Of the averages, per update: they look back about 5 and 20 updates."""
GOOD_PROGRESS = 0.05
"""fast - slow of a group that learns well: a score rising by 0.0033 an update."""


@dataclass(slots=True)
class _Progress:
    """How a group has done on one task type; scores in [0, 1]."""

    fast: float
    slow: float
    updates: int

    def add(self, score: float) -> None:
        self.fast += (1 - FAST_DECAY) * (score - self.fast)
        self.slow += (1 - SLOW_DECAY) * (score - self.slow)
        self.updates += 1

    def need(self) -> float:
        """How much the group needs a shared signal, in [0, 1]."""
        stall = min(1.0, max(0.0, 1.0 - (self.fast - self.slow) / GOOD_PROGRESS))
        evidence = 1.0 - SLOW_DECAY ** (self.updates - 1)
        return evidence * stall * min(1.0, max(0.0, 1.0 - self.fast))


class Mixed:
    """Between cooperation and rivalry, task by task."""

    name = TrainingMode.MIXED

    def __init__(self) -> None:
        self._progress: dict[TaskType, _Progress] = {}

    def blend(self, task: TrainingTask) -> float:
        """The current share of cooperation in `task`, in [0, 1] and within cooperation_level ± `MAX_SHIFT`."""
        level = task.cooperation_level
        progress = self._progress.get(task.task_type)
        if progress is None:
            return level
        return min(1.0, level + min(MAX_SHIFT, level, 1.0 - level) * progress.need())

    def hears(self, listener: PlayerCard, speaker: PlayerCard, task: TrainingTask) -> bool:
        return may_advise(listener, speaker) and (
            same_team(listener, speaker) or leads(speaker, listener) or self.blend(task) > HEARING_BLEND
        )

    def rewards(
        self, task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
    ) -> dict[SeatId, float]:
        """Raises `ScenarioError` for a score outside [0, 1] or a seat without team entry."""
        scores = check_scores(task, scores, teams)
        together = cooperative.shares(scores)
        several = len(team_battle.members(teams)) > 1
        apart = team_battle.shares(scores, teams) if several else competitive.shares(scores)
        b = self.blend(task)
        return pay(task, {seat: b * together[seat] + (1.0 - b) * apart[seat] for seat in scores})

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Take in the episodes of one finished update. Those with simulated turns say nothing of the models.

        Raises `ScenarioError` for an episode without scores.
        """
        means: dict[TaskType, list[float]] = {}
        for episode in episodes:
            if not episode.outcome.scores:
                raise ScenarioError(f"episode {episode.episode_id!r} has no scores; the scenario must score every seat")
            if not _simulated(episode):
                means.setdefault(episode.task.task_type, []).append(fmean(episode.outcome.scores.values()))
        for task_type, values in means.items():
            score = fmean(values)
            known = self._progress.get(task_type)
            if known is None:
                self._progress[task_type] = _Progress(score, score, 1)
            else:
                known.add(score)

    def state(self) -> dict[str, Any]:
        return {"progress": {key.value: asdict(self._progress[key]) for key in sorted(self._progress)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. Raises `RunFolderError` for anything else."""
        try:
            restored = {TaskType(key): _Progress(**entry) for key, entry in state["progress"].items()}
            valid = all(math.isfinite(p.fast) and math.isfinite(p.slow) and p.updates >= 1 for p in restored.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunFolderError(
                f"the checkpoint's state of mode 'mixed' cannot be read ({error!r}); "
                f"resume with the mode the run was made with, or from an earlier checkpoint"
            ) from error
        if not valid:
            raise RunFolderError("the checkpoint's state of mode 'mixed' has impossible numbers; use an earlier one")
        self._progress = restored


def _simulated(episode: Episode) -> bool:
    return any(turn.tier is Tier.SIMULATED for t in episode.trajectories.values() for turn in t.turns)
