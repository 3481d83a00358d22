"""Putting to the test what a scenario claims of itself.

Symmetry: seats a and b are said to be alike, so who sits where must not matter. Two players are seated one way and the
other way round, over many tasks and seeds; what the same player scores may differ from one play to the next (it is
dealt other cards), but not on average.

Exact figures: `exact` is said to give what playing gives in expectation. Players that answer with uneven, known
probabilities play held-out tasks; the mean of each metric of `play` must be near the exact figure of the same name.

Both compare a mean over n plays with what it should be, and speak up only beyond a bound that chance passes at most
once in ten thousand figures: the empirical Bernstein bound of Maurer and Pontil (2009),

    |mean - truth| <= sqrt(2 v ln(2/d) / n) + 7 r ln(2/d) / (3 (n - 1)),    d = 1e-4, v the variance, r the range

For exact figures r is at least 1, so that a rare event nobody saw is not taken for a mistake.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from statistics import fmean, pvariance
from typing import Final

from coterie.errors import cause
from coterie.scenarios.base import ExactlyMeasured, Scenario
from coterie.scenarios.check_plays import OPEN, Hooks, StuckError, name_of, outcome_of
from coterie.scenarios.findings import Findings
from coterie.scenarios.practice import Answer, PracticeTable
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TrainingTask

Seated = tuple[int, TrainingTask, Sequence[Seat]]
"""A seed, a task, and its seats."""
Player = Callable[[Sequence[str], random.Random], str]
"""(choices, rng) -> an answer."""

_DOUBT: Final = 1e-4
_ROUNDING: Final = 1e-7
_PATIENCE_S: Final = 5.0
"""For one series of plays."""
_WORDS: Final = ("yes", "no")
"""What players say where there are no choices."""

_PAIRS: Final[Mapping[str, tuple[Player, Player]]] = {
    "first choice against last choice": (lambda choices, rng: choices[0], lambda choices, rng: choices[-1]),
    "first choice against any choice": (lambda choices, rng: choices[0], lambda choices, rng: rng.choice(choices)),
    "last choice against any choice": (lambda choices, rng: choices[-1], lambda choices, rng: rng.choice(choices)),
}


def bound(values: Sequence[float], least_range: float = 0.0) -> float:
    """How far the mean of these may be from what it estimates.

    Args:
        least_range: of what could have been seen, where that is more than what was.
    """
    n = len(values)
    doubt = math.log(2 / _DOUBT)
    spread = max(least_range, max(values) - min(values))
    return _ROUNDING + math.sqrt(2 * pvariance(values) * doubt / n) + 7 * spread * doubt / (3 * max(1, n - 1))


# -- symmetry -----------------------------------------------------------------------------------------------------


async def check_symmetry(
    scenario: Scenario, seated: Sequence[Seated], plays: int, timeout_s: float, hooks: Hooks, found: Findings
) -> None:
    """Seat players both ways round wherever two seats are said to be alike."""
    pairs: dict[tuple[SeatId, SeatId], list[Seated]] = {}
    for entry in seated:
        for seat in entry[2]:
            if seat.symmetric_with is not None:
                pairs.setdefault((seat.symmetric_with, seat.seat_id), []).append(entry)
    for (one, other), entries in sorted(pairs.items()):
        together: list[float] = []
        for which, (name, players) in enumerate(_PAIRS.items()):
            differences = []
            began = time.monotonic()
            for number, entry in enumerate(islice(cycle(entries), plays // len(_PAIRS))):
                if time.monotonic() - began > _PATIENCE_S:
                    break  # fewer plays only widen the bound
                seed = number * len(_PAIRS) + which  # chance of its own in every series, so that all can be joined
                both = await _both_ways(scenario, entry, (one, other), players, seed, timeout_s, hooks, found)
                if both is None:
                    return
                differences.append(both)
            _compare(one, other, name, differences, found)
            together += differences
        # where chance favours a seat, whoever plays, each series alone may be too short to tell
        _compare(one, other, "all of these players", together, found)


async def _both_ways(
    scenario: Scenario,
    entry: Seated,
    pair: tuple[SeatId, SeatId],
    players: tuple[Player, Player],
    number: int,
    timeout_s: float,
    hooks: Hooks,
    found: Findings,
) -> float | None:
    """What the first player scores at the first seat, less what it scores at the second; None where a play failed."""
    _, task, seats = entry
    scores: list[float] = []
    for flipped in (False, True):
        at = dict(zip(pair[::-1] if flipped else pair, (0, 1), strict=True))
        table = OPEN.table(task, seats, seed=number, answer=_answers(at, players, number))
        where = f"{name_of(task)}, {pair[0]} and {pair[1]} seated both ways"
        outcome = await outcome_of(scenario, task, table, timeout_s, where, hooks, found)
        if outcome is None:
            return None
        scores.append(outcome.scores[pair[1] if flipped else pair[0]])
    return scores[0] - scores[1]


def _answers(at: Mapping[SeatId, int], players: tuple[Player, Player], number: int) -> Answer:
    """A player's dice depend on the play and on who it is, not on where it sits; others answer by the table's."""
    dice = [random.Random(f"{number}:{who}") for who in range(2)]

    def answer(seat: SeatId, observation: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        among = _WORDS if choices is None else choices
        return players[at[seat]](among, dice[at[seat]]) if seat in at else rng.choice(among)

    return answer


def _compare(one: SeatId, other: SeatId, name: str, differences: Sequence[float], found: Findings) -> None:
    mean = fmean(differences)
    if abs(mean) > bound(differences):
        found.add(
            f"{other!r} is said to be symmetric_with {one!r}, but it matters who sits where",
            f"{name}: {mean:+.3g} on average over {len(differences)} plays for sitting at {one!r}",
            mend="leave symmetric_with out (one moves first?), or draw from table.rng who gets what",
        )


# -- exact figures --------------------------------------------------------------------------------------------------


async def check_exact(
    scenario: Scenario, seated: Sequence[Seated], plays: int, timeout_s: float, hooks: Hooks, found: Findings
) -> None:
    """Compare `exact` with what playing gives on average; on held-out tasks, as evaluation does."""
    assert isinstance(scenario, ExactlyMeasured)
    entries = [entry for entry in seated if entry[1].split is Split.HELDOUT]
    told = [(entry, await _exact_at(scenario, entry, timeout_s, found)) for entry in entries[:3]]
    figures = [(entry, exact) for entry, exact in told if exact is not None]
    if len(figures) < len(told) or not figures:
        return
    if all(_near(exact, figures[0][1]) for _, exact in figures):
        # the figures are of all tasks of the side, not of the one at the table
        series = [(figures[0][1], list(islice(cycle(entries), plays)))]
    else:
        series = [(exact, [entry] * (plays // len(figures))) for entry, exact in figures]
    for exact, played in series:
        outcomes = await _play_all(scenario, played, timeout_s, hooks, found)
        if outcomes:
            _compare_figures(exact, outcomes, f"{len(outcomes)} plays of {name_of(played[0][1])} and on", found)


async def _exact_at(
    scenario: ExactlyMeasured, entry: Seated, timeout_s: float, found: Findings
) -> Mapping[str, float] | None:
    _, task, seats = entry
    try:
        return await asyncio.wait_for(scenario.exact(_uneven_table(task, seats, 0)), max(timeout_s, 60.0))
    except TimeoutError:
        found.note("exact took more than a minute; it was not compared with playing")
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is to be reported
        found.add(f"exact raised {cause(error)}", name_of(task), mend="mend the line it names")
    return None


async def _play_all(
    scenario: Scenario, played: Sequence[Seated], timeout_s: float, hooks: Hooks, found: Findings
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for number, (_, task, seats) in enumerate(played):
        if time.monotonic() - began > _PATIENCE_S:
            break
        table = _uneven_table(task, seats, number)
        outcome = await outcome_of(
            scenario, task, table, timeout_s, f"{name_of(task)}, answers by chance", hooks, found
        )
        if outcome is None:
            raise StuckError
        outcomes.append(outcome)
    return outcomes


def _compare_figures(exact: Mapping[str, float], outcomes: Sequence[Outcome], where: str, found: Findings) -> None:
    shared = [name for name in exact if all(name in outcome.metrics for outcome in outcomes)]
    for name in shared:
        values = [float(outcome.metrics[name]) for outcome in outcomes]
        if abs(fmean(values) - exact[name]) > bound(values, max(1.0, abs(exact[name]))):
            found.add(
                f"exact figure {name!r} is not what playing gives",
                f"{where}: {fmean(values):.4g} on average, exactly {exact[name]:.4g}",
                mend="both must mean the same: the expectation over held-out tasks, chance and answers",
            )
    alone = [name for name in exact if name not in shared]
    if alone:
        found.note(f"no metric of play has the name of these exact figures, so they were believed: {', '.join(alone)}")


def _uneven_table(task: TrainingTask, seats: Sequence[Seat], seed: int) -> PracticeTable:
    return OPEN.table(task, seats, seed=seed, probabilities=_uneven)


def _uneven(seat: SeatId, observation: Observation, choices: Sequence[str]) -> Sequence[float]:
    """Different for every question, and never near 0 or 1."""
    rng = random.Random(f"{seat}|{observation}|{choices}")
    weights = [rng.uniform(0.2, 1.0) for _ in choices]
    return [weight / sum(weights) for weight in weights]


def _near(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) <= 1e-9 for name in one)
