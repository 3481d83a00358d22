"""What scenarios with a right answer have in common: who advises, who hears it, and how tokens become efficiency.

    advice_speakers -> each gives advice -> heard_by(listener) -> each answers -> accuracy, tokens -> team_scores

Advice exists only if the strategy communicates. Under central leadership only leaders speak; delegated, everybody
does. Advice is shown to a listener if mode and roles let it through (`table.hears`) and it was not withheld in this
episode (`table.delivers`). A score is `accuracy * efficiency`, so saying the same in fewer tokens is worth more, and
a wrong answer is worth nothing however short it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coterie.errors import ScenarioError
from coterie.scenarios.base import Table
from coterie.types import ModelRole, SeatId

_TEAMWORK_WORDS = re.compile(r"协同|合作|cooperat|collaborat", re.IGNORECASE)
_RIVALRY_WORDS = re.compile(r"竞争|优化|compet|optimi", re.IGNORECASE)


def advice_speakers(table: Table) -> list[SeatId]:
    """Seats that take an advice turn, in table order; none if the strategy has no communication, or if
    `task.max_steps` leaves a seat one turn only, which is its answer.

    A seat nobody hears is left out: its advice could change nothing and would only cost tokens. Whether advice is
    withheld in this episode plays no part, or a speaker could tell.
    """
    if not table.strategy.communication or table.task.max_steps < 2:
        return []
    central = table.strategy.leadership == "central"
    return [
        speaker
        for speaker in table.seats
        if (not central or table[speaker].card.role is ModelRole.LEADER)
        and any(listener != speaker and table.hears(listener, speaker) for listener in table.seats)
    ]


def heard_by(table: Table, listener: SeatId, advice: Mapping[SeatId, str]) -> list[tuple[SeatId, str]]:
    """The advice that reaches `listener`, as (speaker, text) in table order; never its own, never withheld advice."""
    return [
        (speaker, advice[speaker])
        for speaker in table.seats
        if speaker in advice and speaker != listener and table.hears(listener, speaker) and table.delivers(speaker)
    ]


def efficiency(tokens_used: float, budget: float) -> float:
    """`1 - 0.5 * tokens_used / budget`, clipped to [0.5, 1].

    Raises:
        ScenarioError: the budget is not positive, or the usage is negative.
    """
    if budget <= 0 or tokens_used < 0:
        raise ScenarioError(
            f"efficiency needs a positive token budget and a usage of at least 0, got {tokens_used} of {budget}"
        )
    return min(1.0, max(0.5, 1.0 - 0.5 * tokens_used / budget))


def team_scores(
    table: Table,
    accuracy: Mapping[SeatId, float],
    tokens_used: Mapping[SeatId, int],
    budget: int | Mapping[SeatId, int],
) -> dict[SeatId, float]:
    """Score of every seat: accuracy times efficiency.

    With `strategy.resource_sharing`, usage and budget are summed over each of `token_pools`, so one seat's long
    answer costs its partners too.

    Args:
        accuracy: of every seat at the table, in [0, 1].
        tokens_used: tokens each seat generated, advice included; a seat left out used none.
        budget: tokens each seat was allowed, advice included: one number for all, or one per seat.

    Raises:
        ScenarioError: a seat lacks an accuracy or a budget, an unknown seat is named, or a number is out of range.
    """
    _check_seats(table, "accuracy", accuracy, complete=True)
    _check_seats(table, "tokens_used", tokens_used, complete=False)
    budgets = dict.fromkeys(table.seats, budget) if isinstance(budget, int) else dict(budget)
    _check_seats(table, "budget", budgets, complete=True)
    outside = [seat for seat in table.seats if not 0.0 <= accuracy[seat] <= 1.0]
    if outside:
        raise ScenarioError(f"accuracy of seat {outside[0]!r} is {accuracy[outside[0]]}, outside 0..1")
    scores = {}
    for pool in token_pools(table):
        share = efficiency(sum(tokens_used.get(seat, 0) for seat in pool), sum(budgets[seat] for seat in pool))
        scores.update({seat: accuracy[seat] * share for seat in pool})
    return {seat: scores[seat] for seat in table.seats}


def token_pools(table: Table) -> list[list[SeatId]]:
    """Seats grouped by shared token budget; one seat each without `strategy.resource_sharing`.

    A pool is a set of seats of one team (all seats, where nobody has a team) linked by hearing: followers who each
    hear the same leader share one pool, competitors who hear nobody keep their own.
    """
    if not table.strategy.resource_sharing:
        return [[seat] for seat in table.seats]
    pools: list[list[SeatId]] = []
    for seat in table.seats:
        linked = [pool for pool in pools if any(_shares(table, seat, other) for other in pool)]
        pools = [pool for pool in pools if pool not in linked]
        pools.append([*(other for pool in linked for other in pool), seat])
    return pools


def response_quality(text: str) -> float:
    """The keyword bonus of a response: a named figure, not a check of whether the response is right.

    +0.1 if it speaks of cooperation (协同, 合作, cooperat…, collaborat…), else +0.05; +0.05 more if it speaks of
    competition or optimisation (竞争, 优化, compet…, optimi…). Between 0.05 and 0.15. As a reward it teaches a policy
    to chant the words.
    """
    bonus = 0.1 if _TEAMWORK_WORDS.search(text) else 0.05
    return bonus + (0.05 if _RIVALRY_WORDS.search(text) else 0.0)


def _shares(table: Table, one: SeatId, other: SeatId) -> bool:
    return table[one].card.team == table[other].card.team and (table.hears(one, other) or table.hears(other, one))


def _check_seats(table: Table, what: str, given: Mapping[SeatId, object], *, complete: bool) -> None:
    unknown = [seat for seat in given if seat not in table.seats]
    missing = [seat for seat in table.seats if complete and seat not in given]
    if unknown or missing:
        problem = f"names the unknown seat {unknown[0]!r}" if unknown else f"lacks seat {missing[0]!r}"
        raise ScenarioError(f"{what} {problem}; the seats are {', '.join(table.seats)}")
