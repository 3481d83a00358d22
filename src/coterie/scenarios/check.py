"""Whether a scenario keeps its contract, for people who write one:

    problems = check(MyScenario(MyScenario.Options()))
    assert not problems, "\\n".join(problems)

Tasks are drawn and compared, then played at practice tables: in both languages, with nobody heard, everybody heard, a
leader heard, and advice withheld; by random answers, and by the scenario's own scripts. Each problem is one plain
sentence, reported once, with the first task it was seen on.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol, runtime_checkable

from coterie.scenarios.base import ChecksTasks, ExactlyMeasured, HasScripts, Scenario, ScenarioOptions, Script
from coterie.scenarios.practice import Answer, Hearing, PracticeTable, everyone, nobody
from coterie.types import (
    ModelRole,
    Observation,
    Outcome,
    PlayerCard,
    Seat,
    SeatId,
    Split,
    TrainingMode,
    TrainingTask,
)


@runtime_checkable
class SingleTask(Protocol):
    """A scenario may say that its training and held-out tasks share their content (a matrix game has only one)."""

    single_task: bool


@dataclass(frozen=True)
class _Setting:
    """One way of seating the players."""

    name: str
    mode: TrainingMode
    role: ModelRole
    hearing: Hearing
    led: bool = False
    withheld: bool = False

    def table(
        self, task: TrainingTask, seats: Sequence[Seat], *, seed: int, language: str, answer: Answer | None = None
    ) -> PracticeTable:
        cards = [
            PlayerCard(seat.seat_id, None, ModelRole.LEADER if self.led and i == 0 else self.role, "team")
            for i, seat in enumerate(seats)
        ]
        return PracticeTable(
            task,
            seats,
            seed=seed,
            answer=answer,
            cards=cards,
            mode=self.mode,
            language=language,
            hearing=self.hearing,
            withheld=[seat.seat_id for seat in seats] if self.withheld else (),
        )


_SETTINGS: Final = (
    _Setting("nobody is heard", TrainingMode.COMPETITIVE, ModelRole.COMPETITOR, nobody),
    _Setting("everybody is heard", TrainingMode.COOPERATIVE, ModelRole.TEAMMATE, everyone),
    _Setting("a leader is heard", TrainingMode.COOPERATIVE, ModelRole.FOLLOWER, everyone, led=True),
    _Setting("advice is withheld", TrainingMode.MIXED, ModelRole.TEAMMATE, everyone, withheld=True),
)


class _StuckError(Exception):
    """A play did not end."""


@dataclass
class _Problems:
    found: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, where: str = "") -> None:
        """Keep the first place a problem was seen at."""
        self.found.setdefault(problem, where)

    def lines(self) -> list[str]:
        return [f"{where}: {problem}" if where else problem for problem, where in self.found.items()]


def check(scenario: Scenario, *, seeds: Sequence[int] = (0, 1), tasks: int = 20, timeout_s: float = 10.0) -> list[str]:
    """What is wrong with a scenario; an empty list if nothing was found. Not to be called inside a running event loop.

    Args:
        seeds: of the tasks and of the play; at least two different ones.
        tasks: looked at for each seed and side; all of them are played, so keep it small.
        timeout_s: for one play; after one that does not end, no other is tried. A loop that never awaits cannot be
            interrupted.
    """
    problems = _Problems()
    options = getattr(scenario, "Options", None)  # probing is this function's job
    if not (isinstance(options, type) and issubclass(options, ScenarioOptions)):
        problems.add("Options must be a subclass of coterie.scenarios.base.ScenarioOptions")
    before = random.getstate()
    drawn = _draw(scenario, seeds, tasks, problems)
    for seed, task in drawn:
        seats = _check_seats(scenario, task, problems)
        if not seats:
            continue
        try:
            asyncio.run(_check_play(scenario, task, seats, seed, timeout_s, problems))
        except _StuckError:
            break  # every other play would take as long
    if random.getstate() != before:
        problems.add("it uses the global random state; draw from table.rng and from the seed given to tasks()")
    return problems.lines()


def _draw(scenario: Scenario, seeds: Sequence[int], count: int, problems: _Problems) -> list[tuple[int, TrainingTask]]:
    """The distinct tasks of both sides, each with the seed it was first drawn by."""
    sides: dict[Split, dict[str, tuple[int, TrainingTask]]] = {split: {} for split in Split}
    for split in Split:
        for seed in seeds:
            try:
                drawn, again = (list(islice(scenario.tasks(split, seed), count)) for _ in range(2))
            except Exception as error:  # noqa: BLE001 - whatever it raises is what is to be reported
                problems.add(f"tasks({split}, seed) raised {_said(error)}")
                continue
            if drawn != again:
                problems.add(f"tasks({split}, seed) gives other tasks when called again with the same seed")
            if split is Split.TRAIN and len(drawn) < count:
                problems.add(f"tasks(train) ends after {len(drawn)} tasks; it must never end")
            if not drawn:
                problems.add(f"tasks({split}) gives no task")
            for task in drawn:
                if task.split is not split:
                    problems.add(f"tasks({split}) gives a task whose split is {task.split}", _name(task))
                sides[split].setdefault(_content(task), (seed, task))
    shared = sides[Split.TRAIN].keys() & sides[Split.HELDOUT].keys()
    if shared and not (isinstance(scenario, SingleTask) and scenario.single_task):
        task = sides[Split.HELDOUT][min(shared)][1]
        problems.add("a held-out task has the content of a training task; if there is only one, say single_task = True",
                     _name(task))  # fmt: skip
    return [pair for side in sides.values() for pair in side.values()]


def _check_seats(scenario: Scenario, task: TrainingTask, problems: _Problems) -> list[Seat]:
    """The seats of a task, or none if they cannot be played."""
    try:
        seats, again = list(scenario.seats(task)), list(scenario.seats(task))
    except Exception as error:  # noqa: BLE001 - as above
        problems.add(f"seats() raised {_said(error)}", _name(task))
        return []
    ids = [seat.seat_id for seat in seats]
    if seats != again:
        problems.add("seats() gives other seats when called again", _name(task))
    if len(ids) != task.required_models:
        problems.add(f"seats() gives {len(ids)} seats, but required_models is {task.required_models}", _name(task))
    for seat in seats:
        if seat.symmetric_with is not None and (seat.symmetric_with not in ids or seat.symmetric_with == seat.seat_id):
            problems.add(f"{seat.seat_id!r} is symmetric_with {seat.symmetric_with!r}, no other seat", _name(task))
    if isinstance(scenario, ChecksTasks):
        try:
            scenario.check_task(task)
        except Exception as error:  # noqa: BLE001 - as above
            problems.add(f"check_task() refuses the scenario's own task: {_said(error)}", _name(task))
    if not ids or len(set(ids)) < len(ids):
        problems.add(f"seats() gives {ids}; there must be at least one, and none twice", _name(task))
        return []
    return seats


async def _check_play(
    scenario: Scenario, task: TrainingTask, seats: Sequence[Seat], seed: int, timeout_s: float, problems: _Problems
) -> None:
    for language in ("en", "zh"):
        for setting in _SETTINGS:
            where = f"{_name(task)}, language {language}, {setting.name}"
            tables = [setting.table(task, seats, seed=seed, language=language) for _ in range(2)]
            outcomes = [await _outcome(scenario, task, table, timeout_s, where, problems) for table in tables]
            if None in outcomes:
                continue
            if outcomes[0] != outcomes[1]:
                problems.add("the same answers and the same table.rng give another outcome", where)
            if any(tables[0][seat].shown != tables[1][seat].shown for seat in tables[0].seats):
                problems.add("the same answers and the same table.rng give other prompts", where)
        setting = _SETTINGS[1]
        if isinstance(scenario, ExactlyMeasured):
            await _check_exact(scenario, setting.table(task, seats, seed=seed, language=language), problems)
        if isinstance(scenario, HasScripts):
            for name, script in scenario.scripts.items():
                where = f"{_name(task)}, language {language}, script {name!r}"
                table = setting.table(task, seats, seed=seed, language=language, answer=_scripted(script))
                await _outcome(scenario, task, table, timeout_s, where, problems)


async def _outcome(
    scenario: Scenario, task: TrainingTask, table: PracticeTable, timeout_s: float, where: str, problems: _Problems
) -> Outcome | None:
    """The outcome of one play, checked; None if it raised. Raises `_StuckError` if it did not end."""
    try:
        outcome = await asyncio.wait_for(scenario.play(task, table), timeout_s)
    except TimeoutError:
        problems.add(f"play did not end within {timeout_s:g} s", where)
        raise _StuckError from None
    except Exception as error:  # noqa: BLE001 - as above
        problems.add(f"play raised {_said(error)}", where)
        return None
    if set(outcome.scores) != set(table.seats):
        problems.add(f"scores are of {sorted(outcome.scores)}, the seats are {sorted(table.seats)}", where)
    strangers = sorted(set(outcome.accuracy) - set(table.seats))
    if strangers:
        problems.add(f"accuracy names {strangers[0]!r}, which is no seat", where)
    for what, values in (("score", outcome.scores), ("accuracy", outcome.accuracy)):
        for seat, value in values.items():
            if not 0.0 <= value <= 1.0:
                problems.add(f"the {what} of seat {seat!r} is outside 0..1", f"{where}, {value}")
    _check_finite("metric", outcome.metrics, where, problems)
    return outcome


async def _check_exact(scenario: ExactlyMeasured, table: PracticeTable, problems: _Problems) -> None:
    where = f"{_name(table.task)}, exact"
    try:
        first, second = await scenario.exact(table), await scenario.exact(table)
    except Exception as error:  # noqa: BLE001 - as above
        problems.add(f"exact raised {_said(error)}", where)
        return
    if first != second:
        problems.add("exact gives other figures when called again", where)
    if any(table[seat].turns for seat in table.seats):
        problems.add("exact takes turns; it must ask for distributions", where)
    _check_finite("exact figure", first, where, problems)


def _check_finite(what: str, figures: Mapping[str, float], where: str, problems: _Problems) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            problems.add(f"{what} {name!r} is not finite", f"{where}, {value}")


def _scripted(script: Script) -> Answer:
    def answer(seat: SeatId, observation: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        return script(observation, choices or (), rng)

    return answer


def _content(task: TrainingTask) -> str:
    """What makes a task another task; its id, where it has no content of its own."""
    if not task.content:
        return f"{task.task_type}/{task.task_id}"
    return json.dumps(dict(task.content), sort_keys=True, default=repr)


def _name(task: TrainingTask) -> str:
    return f"task {task.task_id!r}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
