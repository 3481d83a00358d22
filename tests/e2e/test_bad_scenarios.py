"""Scenarios that break their contract: the episode fails with its cause on record, and the run goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import ScenarioError
from coterie.runs.directory import RunDirectory
from coterie.runs.store import Store
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

YES_NO = ("yes", "no")


async def decent(task: TrainingTask, table: Table) -> Outcome:
    turns = {seat: await table[seat].act(Observation("Say yes."), choices=YES_NO) for seat in table.seats}
    return Outcome({seat: float(turn.choice == 0) for seat, turn in turns.items()})


async def raises(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("Say yes."), choices=YES_NO)
    raise KeyError("piece")


async def awaits_for_ever(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("Say yes."), choices=YES_NO)
    await asyncio.Event().wait()
    raise AssertionError


async def polls_for_ever(task: TrainingTask, table: Table) -> Outcome:
    while True:
        await asyncio.sleep(0.01)


async def never_awaits(task: TrainingTask, table: Table) -> Outcome:
    while True:
        time.perf_counter()


async def asks_for_ever(task: TrainingTask, table: Table) -> Outcome:
    while True:
        await table["one"].act(Observation("Say yes."), choices=YES_NO)


async def asks_a_stranger(task: TrainingTask, table: Table) -> Outcome:
    await table["three"].act(Observation("Say yes."), choices=YES_NO)
    raise AssertionError


async def forgets_a_seat(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": 1.0})


async def scores_a_stranger(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": 1.0, "two": 1.0, "three": 0.0})


async def scores_beyond_one(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": 1.5, "two": 0.0})


async def scores_nan(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": float("nan"), "two": 0.0})


async def scores_a_word(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": "good", "two": 0.0})  # type: ignore[dict-item]


async def metric_is_nan(task: TrainingTask, table: Table) -> Outcome:
    return Outcome({"one": 1.0, "two": 0.0}, metrics={"welfare": float("nan")})


async def returns_nothing(task: TrainingTask, table: Table) -> Outcome:
    await decent(task, table)
    return None  # type: ignore[return-value]


async def no_choices(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("Say yes."), choices=())
    raise AssertionError


async def choices_twice(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("Say yes."), choices=("yes", "no", "yes"))
    raise AssertionError


async def choices_not_text(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("Pick one."), choices=(1, 2))  # type: ignore[arg-type]
    raise AssertionError


async def shows_no_observation(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act("Say yes.", choices=YES_NO)  # type: ignore[arg-type]
    raise AssertionError


async def shows_no_text(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation(user=["Say", "yes"]), choices=YES_NO)  # type: ignore[arg-type]
    raise AssertionError


async def shows_too_much(task: TrainingTask, table: Table) -> Outcome:
    await table["one"].act(Observation("word " * 4000), choices=YES_NO)
    raise AssertionError


async def exits(task: TrainingTask, table: Table) -> Outcome:
    raise SystemExit(1)


FAULTS: Mapping[str, tuple[Callable[[TrainingTask, Table], Awaitable[Outcome]], str]] = {
    play.__name__: (play, said)
    for play, said in (
        (raises, "KeyError: 'piece' (test_bad_scenarios.py:"),
        (awaits_for_ever, "play went on for more than 0.3 s without asking for a turn"),
        (polls_for_ever, "play went on for more than 0.3 s without asking for a turn"),
        (never_awaits, "play ran for more than 0.3 s without awaiting anything"),
        (asks_for_ever, "seat 'one' was asked for more than 3 turns (task.max_steps)"),
        (asks_a_stranger, "the scenario asked for seat 'three', but this table has one, two"),
        (forgets_a_seat, "outcome scores seats ['one'], but the table has ['one', 'two']"),
        (scores_a_stranger, "outcome scores seats ['one', 'three', 'two']"),
        (scores_beyond_one, "score of seat 'one' is 1.5, outside [0, 1]"),
        (scores_nan, "score of seat 'one' is nan, outside [0, 1]"),
        (scores_a_word, "score of seat 'one' is 'good'; it must be a Python number in [0, 1]"),
        (metric_is_nan, "metric 'welfare' is nan; it must be a finite number"),
        (returns_nothing, "play returned None; return an Outcome(scores)"),
        (no_choices, "seat 'one' was given an empty list of choices"),
        (choices_twice, "seat 'one' was given choices that are blank or stand twice: ['yes', 'no', 'yes']"),
        (choices_not_text, "seat 'one' was given the choice 1; choices must be texts"),
        (shows_no_observation, "seat 'one' was shown 'Say yes.'; show it an Observation(user=…)"),
        (shows_no_text, "seat 'one' was shown an Observation whose user is ['Say', 'yes']; it must be text"),
        (shows_too_much, "RequestError: task 'train-1', seat 'one', turn 1: prompt and answer need"),
        (exits, "play called exit(1)"),
    )
}
"""Name -> a play that goes wrong, and what is said of it."""


class FaultOptions(ScenarioOptions):
    fault: str
    """A key of `FAULTS`, or where else it goes wrong."""
    when: Literal["sometimes", "always"] = "sometimes"


class Faulty:
    """Every other training task goes wrong; held-out tasks do not."""

    Options = FaultOptions

    def __init__(self, options: FaultOptions) -> None:
        self.options = options

    def bad(self, task: TrainingTask) -> bool:
        return task.split is Split.TRAIN and (self.options.when == "always" or task.content["n"] % 2 == 1)

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        for number in range(2 if split is Split.HELDOUT else 10_000):
            if self.options.fault == "tasks raise" and split is Split.TRAIN and number == 4:
                raise OSError("no such word list")
            yield TrainingTask(
                f"{split}-{number}", TaskType.REASONING, max_steps=3, required_models=2, content={"n": number},
                split=split,
            )  # fmt: skip

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        if self.options.fault == "seats raise" and self.bad(task):
            raise IndexError("no chair")
        if self.options.fault == "seat twice" and self.bad(task):
            return [Seat("one"), Seat("one")]
        return [Seat("one"), Seat("two")]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        play, _ = FAULTS.get(self.options.fault, (decent, "")) if self.bad(task) else (decent, "")
        return await play(task, table)


class AlwaysFaulty(Faulty):
    def bad(self, task: TrainingTask) -> bool:
        return True


Make = Callable[..., list[str]]


@pytest.fixture
def command(tiny_path: Path, tmp_path: Path) -> Make:
    def make(fault: str, *changes: str, when: str = "sometimes") -> list[str]:
        config = {
            "name": "faulty",
            "updates": 2,
            "base": {"model": str(tiny_path), "threads": 1},
            "scenario": {"id": f"{__name__}:Faulty", "options": {"fault": fault, "when": when}},
            "models": [{"model_id": "a"}, {"model_id": "b"}],
            "rollout": {
                "tasks_per_update": 2, "group_size": 3, "max_failed_share": 0.5, "episode_timeout_s": 0.3,
            },
            "engine": {"calibration_tasks": 4},
            "evaluation": {"tasks": 2},
        }  # fmt: skip
        path = tmp_path / "faulty.toml"
        path.write_text(tomli_w.dumps(config))
        sets = [part for change in changes for part in ("--set", change)]
        return ["train", str(path), "--folder", str(tmp_path / "run"), *sets]

    return make


def failures(folder: Path) -> list[dict[str, Any]]:
    with Store(RunDirectory.open(folder).database_path) as store:
        return store.failures(limit=100)


SEATS = {
    "seats raise": "task 'train-1': seats() raised IndexError: no chair (test_bad_scenarios.py:",
    "seat twice": "task 'train-1': seats() gave the seat 'one' 2 times",
}


@pytest.mark.parametrize("fault", [*FAULTS, *SEATS])
def test_the_episode_fails_with_its_cause_and_the_run_goes_on(fault: str, command: Make, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(fault))
    assert done.exit_code == 0, done.output
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["episodes/failed_share"] for line in lines] == [0.5, 0.5]
    assert [line["episodes/played"] for line in lines] == [3, 3]
    told = failures(tmp_path / "run")
    assert [(row["update"], row["task_id"]) for row in told] == [(1, "train-1")] * 3 + [(2, "train-3")] * 3
    said = SEATS[fault] if fault in SEATS else FAULTS[fault][1]
    assert said in told[0]["error"]
    assert "Held-out accuracy on 2 tasks" in done.stdout


@pytest.mark.parametrize("fault", ["raises", "awaits_for_ever", "never_awaits", "scores_nan"])
def test_past_the_share_the_run_stops_with_a_summary(fault: str, command: Make, tmp_path: Path) -> None:
    changes = ["rollout.max_failed_share=0.4"] + (["rollout.group_size=1"] if fault == "never_awaits" else [])
    done = CliRunner().invoke(app, command(fault, *changes, when="always"))
    assert done.exit_code == 7
    count = 2 if fault == "never_awaits" else 6
    assert f"update 1: {count} of {count} episodes failed, more than rollout.max_failed_share (0.4)" in done.stderr
    assert FAULTS[fault][1] in done.stderr
    assert "all are in the run's database, table failures" in done.stderr
    assert len(failures(tmp_path / "run")) == count


def test_seats_that_can_never_be_had_are_refused_before_anything_is_loaded(command: Make, tmp_path: Path) -> None:
    arguments = command("seats raise", f"scenario.id={__name__}:AlwaysFaulty", "base.model=/nowhere")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 7
    assert "error: task 'train-0': seats() raised IndexError: no chair" in done.stderr


def test_tasks_that_raise_end_the_run_and_say_so(command: Make, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command("tasks raise"))
    assert done.exit_code == 7
    assert "error: tasks(train) raised OSError: no such word list (test_bad_scenarios.py:" in done.stderr


def test_held_out_tasks_may_fail_within_the_share(
    command: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "bad", lambda self, task: task.task_id == "heldout-1")
    done = CliRunner().invoke(app, command("raises"))
    assert done.exit_code == 0, done.output
    assert "Held-out accuracy on 2 tasks no training step saw (up to 1 failed and are left out)" in done.stdout
    results = json.loads((tmp_path / "run" / "results" / "heldout.json").read_text())
    assert results["players"]["trained"]["failed"] == 1
    done = CliRunner().invoke(
        app, [*command("raises", "rollout.max_failed_share=0.1"), "--folder", str(tmp_path / "2")]
    )
    assert done.exit_code == 7
    assert "held-out task 'heldout-1' failed: KeyError: 'piece'" in done.stderr


def test_turns_after_the_end_are_refused(command: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[str] = []

    async def leaves_somebody_behind(task: TrainingTask, table: Table) -> Outcome:
        async def straggler() -> None:
            await asyncio.sleep(0.05)
            try:
                await table["one"].act(Observation("Too late?"), choices=YES_NO)
            except ScenarioError as error:
                late.append(str(error))

        table.straggler = asyncio.create_task(straggler())  # type: ignore[attr-defined]
        outcome = await decent(task, table)
        other = asyncio.create_task(asyncio.sleep(0.1))
        if task.content["n"] == 0:
            await other  # keeps the update going until the stragglers have asked
        else:
            other.cancel()
        return outcome

    monkeypatch.setitem(FAULTS, "late", (leaves_somebody_behind, ""))  # type: ignore[arg-type]
    done = CliRunner().invoke(app, command("late", "updates=1", "evaluation.tasks=0", when="always"))
    assert done.exit_code == 0, done.output
    assert set(late) <= {"seat 'one' was asked for a turn after its episode was over"}
    assert late
