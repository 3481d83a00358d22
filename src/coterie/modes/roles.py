"""Whose advice may reach whom at all, by role; a mode narrows this further by team.

    speaker \\ listener   any other role   NEUTRAL
    COMPETITOR           no               no        a competitor shares nothing
    any other role       yes              no        a neutral model hears only what is public

Nobody hears itself: a model that holds two seats advises the other seat, not its own.
"""

from __future__ import annotations

from coterie.types import ModelRole, PlayerCard


def may_advise(listener: PlayerCard, speaker: PlayerCard) -> bool:
    """Whether roles let advice of `speaker` reach `listener`, whatever the mode and the teams."""
    return (
        listener.seat_id != speaker.seat_id
        and speaker.role is not ModelRole.COMPETITOR
        and listener.role is not ModelRole.NEUTRAL
    )


def same_team(one: PlayerCard, other: PlayerCard) -> bool:
    """Whether both belong to one team. Those without a team share none, not even with each other."""
    return one.team is not None and one.team == other.team


def leads(speaker: PlayerCard, listener: PlayerCard) -> bool:
    """Whether `speaker` is the leader of `listener`: of its team, or of everyone where either has no team."""
    return (
        speaker.role is ModelRole.LEADER
        and listener.role is ModelRole.FOLLOWER
        and (speaker.team == listener.team or speaker.team is None or listener.team is None)
    )
