"""Whether a scenario keeps its contract, for people who write one:

    problems = check(MyScenario(MyScenario.Options()))
    assert not problems, "\\n".join(problems)

Tasks are drawn and compared, then played at practice tables: in both languages, with nobody heard, everybody heard, a
leader heard, and advice withheld; by random answers, and by the scenario's own scripts; to their end, and cancelled in
the middle. Then what is claimed is put to the test: that seats are alike (`symmetric_with`), and that `exact` gives
what playing gives on average. `examine` also says how to mend each problem; ``coterie check`` prints that.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from itertools import islice

from coterie.errors import ConfigError, cause
from coterie.scenarios.base import ChecksTasks, ExactlyMeasured, HasScripts, Scenario, ScenarioOptions, shares_tasks
from coterie.scenarios.check_claims import check_exact, check_symmetry
from coterie.scenarios.check_plays import Hooks, StuckError, check_plays, name_of
from coterie.scenarios.findings import Findings
from coterie.types import Seat, Split, TrainingTask

Drawn = tuple[int, TrainingTask]
"""The seed a task was drawn by, and the task."""
_EXACT_TASKS = 3
"""Tasks at which exact figures are asked for twice, in both languages."""


def check(scenario: Scenario, *, seeds: Sequence[int] = (0, 1), tasks: int = 20, timeout_s: float = 10.0) -> list[str]:
    """What is wrong with a scenario; an empty list if nothing was found. Not to be called inside a running event loop.

    The arguments are those of `examine`.
    """
    return examine(scenario, seeds=seeds, tasks=tasks, timeout_s=timeout_s).lines()


LEAST_PLAYS = 100
"""With fewer a claim cannot be put to the test."""


def examine(
    scenario: Scenario,
    *,
    seeds: Sequence[int] = (0, 1),
    tasks: int = 20,
    timeout_s: float = 10.0,
    plays: int = 1000,
    hooks: Hooks | None = None,
) -> Findings:
    """What is wrong with a scenario, how to mend it, and what is worth knowing of it. Not inside a running event loop.

    Args:
        seeds: of the tasks and of the play; at least two different ones.
        tasks: looked at for each seed and side; all of them are played, so keep it small.
        timeout_s: for one play; after one that does not end, no other is tried. A loop that never awaits cannot be
            interrupted.
        plays: with which a claim is put to the test (symmetry, exact figures), at least `LEAST_PLAYS`; 0: claims are
            believed.
        hooks: what this module does not know: tokens, modes, and who wants to hear how far it is.

    Raises:
        ConfigError: so few plays that chance would pass for a fault.
    """
    if 0 < plays < LEAST_PLAYS:
        raise ConfigError(
            f"{plays} plays cannot tell a fault from chance; give at least {LEAST_PLAYS}, or 0 to believe what the "
            f"scenario claims"
        )
    hooks = hooks or Hooks()
    found = Findings()
    options = getattr(scenario, "Options", None)  # probing is this function's job
    if not (isinstance(options, type) and issubclass(options, ScenarioOptions)):
        found.add(
            "Options must be a subclass of coterie.scenarios.base.ScenarioOptions",
            mend="class MyOptions(ScenarioOptions): ..., then Options = MyOptions in the scenario's class",
        )
    before = random.getstate()
    hooks.progress("drawing tasks")
    drawn = _draw(scenario, seeds, tasks, found)
    found.tasks = len(drawn)
    seated = [(seed, task, seats) for seed, task in drawn if (seats := _check_seats(scenario, task, found))]
    asked: set[str] = set()
    try:
        for number, (seed, task, seats) in enumerate(seated):
            work = check_plays(scenario, task, seats, seed, timeout_s, hooks, found, exact=number < _EXACT_TASKS)
            asked |= asyncio.run(work)
        if seated and not found.problems:
            _never_asked([seats for _, _, seats in seated], asked, found)
            if plays:
                asyncio.run(check_symmetry(scenario, seated, plays, timeout_s, hooks, found))
                if isinstance(scenario, ExactlyMeasured):
                    asyncio.run(check_exact(scenario, seated, plays, timeout_s, hooks, found))
    except StuckError:
        pass  # it is reported, and every other play would take as long
    if random.getstate() != before:
        found.add(
            "it uses the global random state; draw from table.rng and from the seed given to tasks()",
            mend="replace random.random(), random.choice(...) and the like by table.rng, or random.Random(seed)",
        )
    _note(scenario, found)
    return found


def _note(scenario: Scenario, found: Findings) -> None:
    if shares_tasks(scenario):
        found.note("training and held-out tasks share their content (single_task); a result says nothing of new ones")
    if not isinstance(scenario, ExactlyMeasured):
        found.note("it has no exact(table): results are means over episodes, and evaluation.until cannot be used")
    if not isinstance(scenario, HasScripts):
        found.note("it has no scripts: nobody that plays by a rule to compare with")


def _draw(scenario: Scenario, seeds: Sequence[int], count: int, found: Findings) -> list[Drawn]:
    """The distinct tasks of both sides, each with the seed it was first drawn by."""
    sides: dict[Split, dict[str, Drawn]] = {split: {} for split in Split}
    for split in Split:
        for seed in seeds:
            try:
                drawn, again = (list(islice(scenario.tasks(split, seed), count)) for _ in range(2))
            except Exception as error:  # noqa: BLE001 - whatever it raises is what is to be reported
                found.add(f"tasks({split}, seed) raised {cause(error)}", mend="let tasks() yield tasks for both sides")
                continue
            strangers = [task for task in drawn if not isinstance(task, TrainingTask)]
            if strangers:
                found.add(f"tasks({split}) gives {strangers[0]!r}", mend="yield TrainingTask(...) objects")
                continue
            _check_drawn(split, drawn, again, count, found)
            for task in drawn:
                sides[split].setdefault(_content(task), (seed, task))
    shared = sides[Split.TRAIN].keys() & sides[Split.HELDOUT].keys()
    if shared and not shares_tasks(scenario):
        task = sides[Split.HELDOUT][min(shared)][1]
        found.add(
            "a held-out task has the content of a training task; if there is only one, say single_task = True",
            name_of(task),
            mend="divide words, numbers or seeds between the sides before tasks are made of them",
        )
    return [pair for side in sides.values() for pair in side.values()]


def _check_drawn(
    split: Split, drawn: Sequence[TrainingTask], again: Sequence[TrainingTask], count: int, found: Findings
) -> None:
    if drawn != again:
        found.add(
            f"tasks({split}, seed) gives other tasks when called again with the same seed",
            mend="make random.Random(seed) inside tasks() and draw from nothing else",
        )
    if split is Split.TRAIN and len(drawn) < count:
        found.add(f"tasks(train) ends after {len(drawn)} tasks; it must never end", mend="wrap it in `while True:`")
    if not drawn:
        found.add(f"tasks({split}) gives no task", mend="yield at least one task on each side")
    for task in drawn:
        if task.split is not split:
            found.add(
                f"tasks({split}) gives a task whose split is {task.split}", name_of(task), mend="pass split=split on"
            )


def _check_seats(scenario: Scenario, task: TrainingTask, found: Findings) -> list[Seat]:
    """The seats of a task, or none if they cannot be played."""
    where = name_of(task)
    try:
        seats, again = list(scenario.seats(task)), list(scenario.seats(task))
    except Exception as error:  # noqa: BLE001 - as above
        found.add(f"seats() raised {cause(error)}", where, mend="return a list of Seat(name), for every task")
        return []
    if not all(isinstance(seat, Seat) for seat in seats):
        found.add(f"seats() gives {seats}", where, mend="return a list of Seat(name), not of names")
        return []
    ids = [seat.seat_id for seat in seats]
    if seats != again:
        found.add("seats() gives other seats when called again", where, mend="let them follow from the task alone")
    if len(ids) != task.required_models:
        found.add(
            f"seats() gives {len(ids)} seats, but required_models is {task.required_models}",
            where,
            mend="set required_models of the task to the number of its seats",
        )
    for seat in seats:
        if seat.symmetric_with is not None and (seat.symmetric_with not in ids or seat.symmetric_with == seat.seat_id):
            found.add(
                f"{seat.seat_id!r} is symmetric_with {seat.symmetric_with!r}, no other seat",
                where,
                mend="name another seat of this task, or leave symmetric_with out",
            )
    if isinstance(scenario, ChecksTasks):
        try:
            scenario.check_task(task)
        except Exception as error:  # noqa: BLE001 - as above
            found.add(
                f"check_task() refuses the scenario's own task: {cause(error)}",
                where,
                mend="let check_task() accept whatever tasks() gives",
            )
    if not ids or len(set(ids)) < len(ids):
        found.add(
            f"seats() gives {ids}; there must be at least one, and none twice",
            where,
            mend="give each a name of its own",
        )
        return []
    return seats


def _never_asked(seatings: Sequence[Sequence[Seat]], asked: set[str], found: Findings) -> None:
    """Seats of models that got no turn in any play; whoever sits there learns nothing."""
    for seats in seatings:
        for seat in seats:
            if seat.player is None and seat.seat_id not in asked:
                found.add(
                    f"seat {seat.seat_id!r} is never asked for a turn, so whoever holds it learns nothing",
                    mend="ask it in play(), give it a Scripted player in seats(), or leave it out",
                )


def _content(task: TrainingTask) -> str:
    """What makes a task another task; its id, where it has no content of its own."""
    if not task.content:
        return f"{task.task_type}/{task.task_id}"
    return json.dumps(dict(task.content), sort_keys=True, default=repr)
