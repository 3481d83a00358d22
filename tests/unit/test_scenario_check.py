"""The conformance check finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios.base import ScenarioOptions, Script, Table
from coterie.scenarios.check import check
from coterie.types import Observation, Outcome, PlayerCard, Seat, Split, Strategy, TaskType, TrainingMode, TrainingTask
from tests.support.tables import make_table, make_task


class Good:
    """Repeat the word; there are other words on the held-out side."""

    Options = ScenarioOptions
    words: Mapping[Split, Sequence[str]] = {Split.TRAIN: ("a", "b", "c"), Split.HELDOUT: ("d", "e")}

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        rng = random.Random(seed)
        while True:
            for word in rng.sample(self.words[split], len(self.words[split])):
                yield TrainingTask(
                    f"{split}-{word}", TaskType.GENERATION, required_models=2, content={"word": word}, split=split
                )
            if split is Split.HELDOUT:
                return

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat("one"), Seat("two", symmetric_with="one")]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        word = task.content["word"]
        turns = [await table[seat].act(Observation(f"Say {word}."), choices=(word, "z")) for seat in table.seats]
        return Outcome({turn.seat_id: float(turn.choice == 0) for turn in turns})


def test_a_good_scenario_has_no_problems() -> None:
    assert check(Good()) == []


class NoOptions(Good):
    Options = dict  # type: ignore[assignment]


class OtherTasksEachTime(Good):
    count = itertools.count()

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        return super().tasks(split, next(self.count))


class TrainEnds(Good):
    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        return itertools.islice(super().tasks(split, seed), 2)


class NothingHeldOut(Good):
    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        return iter(()) if split is Split.HELDOUT else super().tasks(split, seed)


class WrongSplit(Good):
    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        return iter([make_task(required_models=2, content={"word": "q"})] if split is Split.HELDOUT else
                    super().tasks(split, seed))  # fmt: skip


class TasksRaise(Good):
    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        raise RuntimeError("no words")


class SharedContent(Good):
    words: Mapping[Split, Sequence[str]] = {Split.TRAIN: ("a", "b", "c"), Split.HELDOUT: ("d", "b")}


class TooFewSeats(Good):
    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat("one")]


class SeatTwice(Good):
    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat("one"), Seat("one")]


class SymmetricWithNobody(Good):
    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat("one"), Seat("two", symmetric_with="three")]


class ScoreTooHigh(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return Outcome({"one": 1.5, "two": float("nan")})


class AccuracyOfAStranger(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return Outcome({"one": 1.0, "two": 0.0}, accuracy={"three": -1.0}, metrics={"m": float("inf")})


class SeatWithoutScore(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return Outcome({"one": 1.0})


class AsksAStranger(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        await table["three"].act(Observation("Hello?"))
        return Outcome({"one": 1.0, "two": 1.0})


class NeverEnds(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        while True:
            await asyncio.sleep(0.01)


class TooManyTurns(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        while True:
            await table["one"].act(Observation("Again."))


class OwnDice(Good):
    dice = random.Random(0)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return Outcome({"one": self.dice.random(), "two": 0.0})


class OtherPrompts(Good):
    count = itertools.count()

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        await table["one"].act(Observation(f"Say something. {next(self.count)}"))
        return Outcome({"one": 1.0, "two": 0.0})


class GlobalDice(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        random.random()
        return await super().play(task, table)


class OnlyEnglish(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return Outcome(dict.fromkeys(table.seats, {"en": 1.0}[table.language]))


class NeedsALeader(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        assert table.strategy.leadership == "delegated", "led"
        return await super().play(task, table)


class ExactTakesTurns(Good):
    async def exact(self, table: Table) -> Mapping[str, float]:
        await table["one"].act(Observation("Say it."))
        return {"success": float("nan")}


class RefusesItsOwn(Good):
    def check_task(self, task: TrainingTask) -> None:
        if task.content["word"] == "d":
            raise ScenarioError("no d")


class BadScript(Good):
    scripts: Mapping[str, Script] = {"rude": lambda observation, choices, rng: "never"}


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        (NoOptions, "Options must be a subclass"),
        (OtherTasksEachTime, "gives other tasks when called again with the same seed"),
        (TrainEnds, "tasks(train) ends after 2 tasks"),
        (NothingHeldOut, "tasks(heldout) gives no task"),
        (WrongSplit, "task 't': tasks(heldout) gives a task whose split is train"),
        (TasksRaise, "tasks(train, seed) raised RuntimeError: no words"),
        (SharedContent, "task 'heldout-b': a held-out task has the content of a training task"),
        (TooFewSeats, "seats() gives 1 seats, but required_models is 2"),
        (SeatTwice, "none twice"),
        (SymmetricWithNobody, "'two' is symmetric_with 'three', no other seat"),
        (ScoreTooHigh, "1.5: the score of seat 'one' is outside 0..1"),
        (ScoreTooHigh, "nan: the score of seat 'two' is outside 0..1"),
        (AccuracyOfAStranger, "accuracy names 'three', which is no seat"),
        (AccuracyOfAStranger, "metric 'm' is not finite"),
        (SeatWithoutScore, "scores are of ['one'], the seats are ['one', 'two']"),
        (AsksAStranger, "play raised ScenarioError: there is no seat 'three'"),
        (NeverEnds, "play did not end within 0.05 s"),
        (TooManyTurns, "more than task.max_steps = 8 turns"),
        (OwnDice, "the same answers and the same table.rng give another outcome"),
        (OtherPrompts, "the same answers and the same table.rng give other prompts"),
        (GlobalDice, "it uses the global random state"),
        (OnlyEnglish, "language zh, nobody is heard: play raised KeyError: 'zh'"),
        (NeedsALeader, "a leader is heard: play raised AssertionError: led"),
        (ExactTakesTurns, "exact takes turns"),
        (ExactTakesTurns, "exact figure 'success' is not finite"),
        (RefusesItsOwn, "task 'heldout-d': check_task() refuses the scenario's own task: ScenarioError: no d"),
        (BadScript, "script 'rude': play raised ScenarioError: seat 'one' answered 'never'"),
    ],
)
def test_each_fault_is_found(scenario: type[Good], problem: str) -> None:
    found = check(scenario(), tasks=3, timeout_s=0.05)
    assert any(problem in line for line in found), found


def test_after_a_play_that_does_not_end_no_other_is_tried() -> None:
    (only,) = check(NeverEnds(), timeout_s=0.01)
    assert only.endswith("play did not end within 0.01 s")


def test_shared_content_may_be_declared() -> None:
    class OneTask(SharedContent):
        single_task = True

    assert check(OneTask()) == []


# -- the practice table ------------------------------------------------------------------------------------------


def act(seen: str = "Say.", **options: Any) -> Any:
    table = make_table(make_task(), "ab", **options.pop("table", {}))
    return asyncio.run(table["a"].act(Observation(seen), **options))


def test_answers_depend_on_seed_seat_and_turn_alone() -> None:
    def texts(order: str, seed: int) -> dict[str, list[str]]:
        table = make_table(make_task(max_steps=9), "ab", seed=seed)

        async def run() -> None:
            for seat in order:
                await table[seat].act(Observation("Say."), max_tokens=3)

        asyncio.run(run())
        return {seat: [turn.text for turn in table[seat].turns] for seat in "ab"}

    assert texts("aabb", 1) == texts("baba", 1)
    assert texts("aabb", 1) != texts("aabb", 2)
    assert texts("aabb", 1)["a"] != texts("aabb", 1)["b"]


def test_turns_are_never_trainable_and_know_their_choice() -> None:
    turn = act(choices=("x", "y z"), table={"probabilities": lambda seat, seen, choices: [0.0, 1.0]})
    assert (turn.text, turn.choice, turn.valid, turn.trainable) == ("y z", 1, True, False)
    assert len(turn.token_ids) == len(turn.logprobs) == 2
    cut = act(max_tokens=2, table={"answer": lambda seat, seen, choices, rng: "one two three"})
    assert (cut.text, cut.valid, len(cut.token_ids)) == ("one two", False, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": " "}, "empty prompt"),
        ({"max_tokens": 0}, "0 tokens to answer in"),
        ({"choices": ()}, "empty list of choices"),
        ({"choices": ("a", "a")}, "stand twice"),
        ({"choices": ("a", " ")}, "blank"),
        ({"choices": ("a", "b"), "table": {"answer": lambda *_: "c"}}, "'c', which is none of 'a', 'b'"),
        ({"choices": ("a", "b"), "table": {"probabilities": lambda *_: [0.5, 0.6]}}, "are no probabilities"),
        ({"table": {"withheld": ["c"]}}, "there is no seat 'c'"),
        ({"table": {"cards": [PlayerCard("d", None)]}}, "there is no seat 'd'"),
    ],
)
def test_a_practice_table_keeps_the_contract(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        act(**options)


def test_nobody_hears_itself_and_strategy_follows_the_task() -> None:
    table = make_table(make_task(cooperation_level=0.9), "ab", mode=TrainingMode.MIXED)
    assert [table.hears(a, b) for a in "ab" for b in "ab"] == [False, True, True, False]
    assert table.strategy == Strategy.of(table.task, TrainingMode.MIXED, has_leader=False)
