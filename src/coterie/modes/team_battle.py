"""Team battle: advice and reward are shared inside a team, and teams fight each other.

    team score       = mean of its members' scores
    share of a team  = by rank among the teams, as in `coterie.modes.competitive`; equal when all teams are level
    reward of a seat = reward_pool * share of its team / members of its team                    (sum: reward_pool)

A seat without a team is a team of one. A single team has no rival and gets reward_pool * team score.

| speaker and listener          | hears                                             |
|-------------------------------|---------------------------------------------------|
| of one team                   | yes, where roles allow it (`coterie.modes.roles`) |
| of different teams            | no                                                |
| one of them without a team    | no                                                |
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from coterie.modes.division import WithoutMemory, check_scores, pay, rank_shares
from coterie.modes.roles import may_advise, same_team
from coterie.types import PlayerCard, SeatId, TeamId, TrainingMode, TrainingTask


def members(teams: Mapping[SeatId, TeamId | None]) -> list[list[SeatId]]:
    """The seats of each team, seats without a team alone; in order of first appearance."""
    sides: dict[tuple[bool, str], list[SeatId]] = {}
    for seat, team in teams.items():
        # The flag keeps a seat without team apart from a team that happens to be named like it.
        sides.setdefault((False, seat) if team is None else (True, team), []).append(seat)
    return list(sides.values())


def shares(scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]) -> dict[SeatId, float]:
    """Shares of the teams by rank, split equally inside each; they sum to 1 with two teams or more."""
    sides = members(teams)
    of_side = rank_shares([fmean(scores[seat] for seat in side) for side in sides])
    split = {seat: share / len(side) for side, share in zip(sides, of_side, strict=True) for seat in side}
    return {seat: split[seat] for seat in scores}


class TeamBattle(WithoutMemory):
    """Friends inside, rivals outside."""

    name = TrainingMode.TEAM_BATTLE

    def hears(self, listener: PlayerCard, speaker: PlayerCard, task: TrainingTask) -> bool:
        return may_advise(listener, speaker) and same_team(listener, speaker)

    def rewards(
        self, task: TrainingTask, scores: Mapping[SeatId, float], teams: Mapping[SeatId, TeamId | None]
    ) -> dict[SeatId, float]:
        """Raises `ScenarioError` for a score outside [0, 1] or a seat without team entry."""
        return pay(task, shares(check_scores(task, scores, teams), teams))
