"""Playing a task in every way that matters, to see that a play keeps its contract.

For each language and each way of being heard a task is played twice with the same answers: outcome and prompts must be
the same. Between the languages nothing but words may differ. Then it is cancelled at its first question and in the
middle: it must end, and leave nothing running.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coterie.errors import cause
from coterie.scenarios.base import ExactlyMeasured, HasScripts, Scenario, Script
from coterie.scenarios.findings import Findings
from coterie.scenarios.practice import Answer, Asked, Hearing, PracticeTable, everyone, nobody
from coterie.types import (
    ModelRole,
    Observation,
    Outcome,
    PlayerCard,
    Seat,
    SeatId,
    TeamId,
    TrainingMode,
    TrainingTask,
)

Divide = Callable[
    [TrainingMode, TrainingTask, Mapping[SeatId, float], Mapping[SeatId, TeamId | None]], Mapping[SeatId, float]
]
"""(mode, task, scores, teams) -> rewards."""


def _silent(what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a check may be told that scenarios know nothing of."""

    tokens: Callable[[Observation, Sequence[str] | None, int], int] | None = None
    """Tokens of a question and its longest answer; None: lengths are not looked at."""
    context: int = 0
    """Tokens the base model takes at most."""
    divide: Divide | None = None
    """How modes divide the reward pool."""
    progress: Callable[[str], None] = _silent
    """Is told what is done next."""


@dataclass(frozen=True)
class Setting:
    """One way of seating the players."""

    name: str
    mode: TrainingMode
    role: ModelRole
    hearing: Hearing
    led: bool = False
    withheld: bool = False

    def table(
        self, task: TrainingTask, seats: Sequence[Seat], *, seed: int, language: str = "en", **options: Any
    ) -> PracticeTable:
        cards = [
            PlayerCard(seat.seat_id, None, ModelRole.LEADER if self.led and i == 0 else self.role, "team")
            for i, seat in enumerate(seats)
        ]
        return PracticeTable(
            task,
            seats,
            seed=seed,
            cards=cards,
            mode=self.mode,
            language=language,
            hearing=self.hearing,
            withheld=[seat.seat_id for seat in seats] if self.withheld else (),
            **options,
        )


OPEN: Final = Setting("everybody is heard", TrainingMode.COOPERATIVE, ModelRole.TEAMMATE, everyone)
SETTINGS: Final = (
    Setting("nobody is heard", TrainingMode.COMPETITIVE, ModelRole.COMPETITOR, nobody),
    OPEN,
    Setting("a leader is heard", TrainingMode.COOPERATIVE, ModelRole.FOLLOWER, everyone, led=True),
    Setting("advice is withheld", TrainingMode.MIXED, ModelRole.TEAMMATE, everyone, withheld=True),
)


class StuckError(Exception):
    """A play did not end; it is reported."""


async def check_plays(
    scenario: Scenario,
    task: TrainingTask,
    seats: Sequence[Seat],
    seed: int,
    timeout_s: float,
    hooks: Hooks,
    found: Findings,
    *,
    exact: bool,
) -> set[SeatId]:
    """Play one task in every way; returns the seats that were asked for a turn. Raises `StuckError`.

    Args:
        exact: whether to ask for exact figures too, which may take long and hardly depend on the task.
    """
    asked: set[SeatId] = set()
    spoken: dict[str, tuple[PracticeTable, Outcome]] = {}
    for language in ("en", "zh"):
        for setting in SETTINGS:
            where = f"{name_of(task)}, language {language}, {setting.name}"
            tables = [setting.table(task, seats, seed=seed, language=language) for _ in range(2)]
            outcomes = [await outcome_of(scenario, task, t, timeout_s, where, hooks, found) for t in tables]
            asked |= {question.seat for question in tables[0].asked}
            _check_questions(tables[0].asked, hooks, where, found)
            if outcomes[0] is None or outcomes[1] is None:
                continue
            if outcomes[0] != outcomes[1]:
                found.add(
                    "the same answers and the same table.rng give another outcome",
                    where,
                    mend="draw all chance from table.rng, and keep nothing from one play to the next",
                )
            if any(tables[0][seat].shown != tables[1][seat].shown for seat in tables[0].seats):
                found.add(
                    "the same answers and the same table.rng give other prompts",
                    where,
                    mend="draw all chance from table.rng; do not rely on the order of a set or on the clock",
                )
            if setting is OPEN:
                spoken[language] = tables[0], outcomes[0]
        if exact and isinstance(scenario, ExactlyMeasured):
            await _check_exact(scenario, OPEN.table(task, seats, seed=seed, language=language), found)
        if isinstance(scenario, HasScripts):
            for name, script in scenario.scripts.items():
                where = f"{name_of(task)}, language {language}, script {name!r}"
                table = OPEN.table(task, seats, seed=seed, language=language, answer=_scripted(script))
                await outcome_of(scenario, task, table, timeout_s, where, hooks, found)
    if len(spoken) == 2:
        _check_languages(name_of(task), spoken["en"], spoken["zh"], found)
        turns = len(spoken["en"][0].asked)
        for unanswered in sorted({0, turns // 2} if turns else set()):
            await _check_cancelled(scenario, task, seats, seed, unanswered, timeout_s, found)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        _report_left("a play leaves", left, name_of(task), found)
    return asked


async def outcome_of(
    scenario: Scenario,
    task: TrainingTask,
    table: PracticeTable,
    timeout_s: float,
    where: str,
    hooks: Hooks,
    found: Findings,
) -> Outcome | None:
    """The outcome of one play, checked; None if it is none. Raises `StuckError` if it did not end."""
    hooks.progress(where)
    found.plays += 1
    try:
        outcome = await asyncio.wait_for(scenario.play(task, table), timeout_s)
    except TimeoutError:
        found.add(
            f"play did not end within {timeout_s:g} s",
            where,
            mend="look for a loop without an end, or an await of something that never comes",
        )
        raise StuckError from None
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is to be reported
        found.add(f"play raised {cause(error)}", where, mend="mend the line it names; bad answers are no errors")
        return None
    if not isinstance(outcome, Outcome):
        found.add(f"play returned {outcome!r}", where, mend="end with return Outcome(scores={seat: ...})")
        return None
    return outcome if _check_outcome(outcome, task, table, where, hooks, found) else None


def _check_outcome(
    outcome: Outcome, task: TrainingTask, table: PracticeTable, where: str, hooks: Hooks, found: Findings
) -> bool:
    own = Findings()  # a problem seen before is not kept again, but this outcome is as wrong as the first
    if set(outcome.scores) != set(table.seats):
        own.add(
            f"scores are of {sorted(outcome.scores)}, the seats are {sorted(table.seats)}",
            where,
            mend="give every seat of seats(task) a score, and nobody else",
        )
    strangers = sorted(set(outcome.accuracy) - set(table.seats))
    if strangers:
        own.add(f"accuracy names {strangers[0]!r}, which is no seat", where, mend="leave it out")
    for what, values in (("score", outcome.scores), ("accuracy", outcome.accuracy)):
        for seat, value in values.items():
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                own.add(
                    f"the {what} of seat {seat!r} is outside 0..1",
                    f"{where}, {value}",
                    mend="move what was won to 0..1 by the least and the most that can be won",
                )
    check_finite("metric", outcome.metrics, where, own)
    found.include(own)
    if own.problems:
        return False
    if hooks.divide is not None:
        teams: dict[SeatId, TeamId | None] = {seat: f"team {i % 2}" for i, seat in enumerate(table.seats)}
        for mode in TrainingMode:
            total = math.fsum(hooks.divide(mode, task, outcome.scores, teams).values())
            if total > task.reward_pool * (1 + 1e-9):
                found.add(f"mode {mode} pays {total:g} of a pool of {task.reward_pool:g}", where, mend="mend the mode")
    return True


async def _check_exact(scenario: ExactlyMeasured, table: PracticeTable, found: Findings) -> None:
    where = f"{name_of(table.task)}, exact"
    try:
        first, second = await scenario.exact(table), await scenario.exact(table)
    except Exception as error:  # noqa: BLE001 - as above
        found.add(f"exact raised {cause(error)}", where, mend="mend the line it names")
        return
    if first != second:
        found.add(
            "exact gives other figures when called again",
            where,
            mend="compute them from table[seat].distribution alone",
        )
    if any(table[seat].turns for seat in table.seats):
        found.add(
            "exact takes turns; it must ask for distributions",
            where,
            mend="replace act(...) by distribution(observation, choices)",
        )
    check_finite("exact figure", first, where, found)


def check_finite(what: str, figures: Mapping[str, float], where: str, found: Findings) -> None:
    for name, value in figures.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            found.add(f"{what} {name!r} is not finite", f"{where}, {value}", mend="leave out what cannot be computed")


def _check_questions(asked: Sequence[Asked], hooks: Hooks, where: str, found: Findings) -> None:
    if hooks.tokens is None:
        return
    for question in asked:
        tokens = hooks.tokens(question.observation, question.choices, question.max_tokens)
        if tokens > hooks.context:
            found.add(
                f"seat {question.seat!r} is shown a prompt that does not fit the base model's {hooks.context} tokens",
                f"{where}, {tokens} tokens",
                mend="show the latest part of what happened, not all of it",
            )


def _check_languages(
    where: str, english: tuple[PracticeTable, Outcome], chinese: tuple[PracticeTable, Outcome], found: Findings
) -> None:
    """The same game in other words: as many questions, to the same seats, with as many choices; the same scores."""
    ours, theirs = english[0].asked, chinese[0].asked
    shapes = [
        [(q.seat, q.kind, None if q.choices is None else len(q.choices)) for q in asked] for asked in (ours, theirs)
    ]
    if shapes[0] != shapes[1]:
        same = sum(1 for _ in _while_equal(shapes[0], shapes[1]))
        found.add(
            "in zh it asks other questions than in en, though the answers are the same",
            f"{where}, question {same + 1}",
            mend="let table.language change words only: seats, kinds, number and order of choices stay",
        )
    elif all(question.choices is not None for question in ours) and _merit(english[1]) != _merit(chinese[1]):
        found.add(
            "the same choices score differently in zh and in en",
            where,
            mend="keep the order of choices the same in both languages, and score by turn.choice",
        )
    if ours and [q.observation for q in ours] == [q.observation for q in theirs]:
        found.note("prompts are the same in en and zh; table.language says which one is wanted")


def _merit(outcome: Outcome) -> Mapping[SeatId, float]:
    """Accuracy where there is one: a score may count tokens, and languages need more or fewer of them."""
    return outcome.accuracy or outcome.scores


def _while_equal(ours: Sequence[object], theirs: Sequence[object]) -> Sequence[object]:
    equal = []
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        equal.append(one)
    return equal


async def _check_cancelled(
    scenario: Scenario,
    task: TrainingTask,
    seats: Sequence[Seat],
    seed: int,
    unanswered: int,
    timeout_s: float,
    found: Findings,
) -> None:
    where = f"{name_of(task)}, cancelled at question {unanswered + 1}"
    table = OPEN.table(task, seats, seed=seed, unanswered=unanswered)
    before = asyncio.all_tasks()
    work: Coroutine[Any, Any, Outcome] = scenario.play(task, table)
    play = asyncio.create_task(work)
    found.plays += 1
    asked = asyncio.create_task(table.waits.wait())
    await asyncio.wait({play, asked}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    play.cancel()
    await asyncio.wait({play, asked}, timeout=timeout_s)
    if not play.done():
        found.add(
            f"a cancelled play does not end within {timeout_s:g} s",
            where,
            mend="let asyncio.CancelledError through; clean up in finally, without waiting for turns",
        )
        raise StuckError
    if not play.cancelled():
        error = play.exception()
        found.add(
            f"a cancelled play {f'raises {cause(error)}' if error is not None else 'goes on and returns an outcome'}",
            where,
            mend="let asyncio.CancelledError through; do not catch BaseException or use a bare except",
        )
    for _ in range(3):  # what was cancelled with it takes a turn or two of the event loop to go
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before
    if left:
        _report_left("a cancelled play leaves", left, where, found)


def _report_left(what: str, left: set[asyncio.Task[Any]], where: str, found: Findings) -> None:
    names = sorted(getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left)
    found.add(
        f"{what} tasks of its own running: {', '.join(names)}",
        where,
        mend="use asyncio.gather or asyncio.TaskGroup, or cancel and await them in finally",
    )
    for task in left:
        task.cancel()


def _scripted(script: Script) -> Answer:
    def answer(seat: SeatId, observation: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        return script(observation, choices or (), rng)

    return answer


def name_of(task: TrainingTask) -> str:
    return f"task {task.task_id!r}"
