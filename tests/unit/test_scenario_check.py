"""The conformance check finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import ScenarioOptions, Script, Table
from coterie.scenarios.check import check, examine
from coterie.scenarios.check_plays import Hooks
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


class SeatUnasked(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        await table["one"].act(Observation("Say it."), choices=("a", "b"))
        return Outcome({"one": 1.0, "two": 1.0})


class NotAnOutcome(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        return None  # type: ignore[return-value]


class NotATask(Good):
    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        yield "task"  # type: ignore[misc]


class NotASeat(Good):
    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return ["one", "two"]  # type: ignore[list-item]


class OneMovesFirst(Good):
    """The second sees what the first said."""

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        first = await table["one"].act(Observation("Hide."), choices=("left", "right"))
        second = await table["two"].act(Observation("Seek."), choices=("left", "right"))
        found = float(first.choice == second.choice)
        return Outcome({"one": 1 - found, "two": found})


class LuckyOne(Good):
    """Chance favours the first seat a little."""

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        for seat in table.seats:
            await table[seat].act(Observation("Roll."), choices=("low", "high"))
        won = float(table.rng.random() < 0.7)
        return Outcome({"one": won, "two": 1 - won})


class Dealt(LuckyOne):
    """Chance favours nobody; what a seat gets differs from play to play."""

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        await super().play(task, table)
        won = float(table.rng.random() < 0.5)
        return Outcome({"one": won, "two": 1 - won})


class OtherQuestionsInChinese(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        if table.language == "zh":
            await table["two"].act(Observation("你好"), choices=("a", "b"))
        return await super().play(task, table)


class OtherOrderInChinese(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        right = 0 if table.language == "en" else 1
        turns = [await table[seat].act(Observation(table.language), choices=("a", "b")) for seat in table.seats]
        return Outcome({turn.seat_id: float(turn.choice == right) for turn in turns})


class WillNotBeCancelled(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        try:
            return await super().play(task, table)
        except asyncio.CancelledError:
            return Outcome({"one": 0.0, "two": 0.0})


class RaisesWhenCancelled(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        try:
            return await super().play(task, table)
        except asyncio.CancelledError:
            raise ValueError("not now") from None


class EndsLateWhenCancelled(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        try:
            return await super().play(task, table)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
            raise


class LeavesATask(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        self.clock = asyncio.create_task(asyncio.sleep(30))
        return await super().play(task, table)


class LeavesATaskWhenCancelled(Good):
    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        clock = asyncio.create_task(asyncio.sleep(30))
        outcome = await super().play(task, table)
        clock.cancel()
        return outcome


class Guess(Good):
    """Both say yes or no; the metric is how often both agree."""

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        seen = Observation(f"Say {task.content['word']}.")
        turns = [await table[seat].act(seen, choices=("yes", "no")) for seat in table.seats]
        agreed = float(turns[0].choice == turns[1].choice)
        return Outcome(dict.fromkeys(table.seats, agreed), metrics={"agreed": agreed})

    async def exact(self, table: Table) -> Mapping[str, float]:
        """Mean over the words of the side."""
        words = self.words[table.task.split]
        return {"agreed": sum([await self.at(table, word) for word in words]) / len(words)}

    async def at(self, table: Table, word: str) -> float:
        one, two = [await table[seat].distribution(Observation(f"Say {word}."), ("yes", "no")) for seat in table.seats]
        return sum(p * q for p, q in zip(one, two, strict=True))


class GuessOfOneTask(Guess):
    """Its figures are of the task at the table."""

    async def exact(self, table: Table) -> Mapping[str, float]:
        return {"agreed": await self.at(table, table.task.content["word"])}


class GuessWrong(Guess):
    async def exact(self, table: Table) -> Mapping[str, float]:
        return {"agreed": 1.0 - (await super().exact(table))["agreed"] * 0.5}


class GuessWrongOfOneTask(GuessOfOneTask):
    async def exact(self, table: Table) -> Mapping[str, float]:
        return {"agreed": (await super().exact(table))["agreed"] ** 2}


class GuessOtherNames(Guess):
    async def exact(self, table: Table) -> Mapping[str, float]:
        return {"agreement": 7.0}


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        (SeatUnasked, "seat 'two' is never asked for a turn, so whoever holds it learns nothing"),
        (NotAnOutcome, "play returned None"),
        (NotATask, "tasks(train) gives 'task'"),
        (NotASeat, "task 'train-b': seats() gives ['one', 'two']"),
        (OneMovesFirst, "'two' is said to be symmetric_with 'one', but it matters who sits where"),
        (LuckyOne, "'two' is said to be symmetric_with 'one', but it matters who sits where"),
        (OtherQuestionsInChinese, "question 1: in zh it asks other questions than in en"),
        (OtherOrderInChinese, "the same choices score differently in zh and in en"),
        (WillNotBeCancelled, "cancelled at question 1: a cancelled play goes on and returns an outcome"),
        (RaisesWhenCancelled, "a cancelled play raises ValueError: not now"),
        (EndsLateWhenCancelled, "a cancelled play does not end within 0.05 s"),
        (LeavesATask, "a play leaves tasks of its own running: sleep"),
        (LeavesATaskWhenCancelled, "cancelled at question 1: a cancelled play leaves tasks of its own running: sleep"),
        (GuessWrong, "exact figure 'agreed' is not what playing gives"),
        (GuessWrongOfOneTask, "exact figure 'agreed' is not what playing gives"),
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


@pytest.mark.parametrize("scenario", [Good, Dealt, Guess, GuessOfOneTask, GuessOtherNames])
def test_what_is_sound_is_not_suspected(scenario: type[Good]) -> None:
    assert check(scenario()) == []


def test_figures_that_nothing_can_be_compared_with_are_noted() -> None:
    notes = examine(GuessOtherNames()).notes
    assert any("no metric of play has the name" in note and "agreement" in note for note in notes)
    assert not any("no metric of play" in note for note in examine(Guess()).notes)


def test_claims_may_be_believed() -> None:
    assert examine(LuckyOne(), plays=0).problems == {}


@pytest.mark.parametrize("plays", [1, 99])
def test_too_few_plays_to_tell_a_fault_from_chance_are_refused(plays: int) -> None:
    with pytest.raises(ConfigError, match=f"{plays} plays cannot tell a fault from chance; give at least 100, or 0"):
        examine(LuckyOne(), plays=plays)


def test_each_problem_says_how_to_mend_it_and_is_told_once() -> None:
    found = examine(SharedContent())
    (problem,) = found.problems.values()
    assert problem.where == "task 'heldout-b'"
    assert problem.mend == "divide words, numbers or seeds between the sides before tasks are made of them"
    told = found.as_dict()
    assert (told["passed"], len(told["problems"]), told["tasks"]) == (False, 1, 5)  # 'b' is played on both sides
    assert told["plays"] == found.plays > 8


def test_prompts_must_fit_and_modes_must_not_pay_more_than_the_pool() -> None:
    hooks = Hooks(tokens=lambda seen, choices, most: len(seen.user) + len(choices or ()), context=7)
    problems = examine(Good(), hooks=hooks).problems.values()
    assert [problem.what for problem in problems] == [
        f"seat {seat!r} is shown a prompt that does not fit the base model's 7 tokens" for seat in ("one", "two")
    ]
    assert all(problem.where.endswith("8 tokens") for problem in problems)
    assert examine(Good(), hooks=replace(hooks, context=8)).problems == {}

    def generous(mode: TrainingMode, task: TrainingTask, scores: Any, teams: Any) -> Any:
        assert teams == {"one": "team 0", "two": "team 1"}
        return dict.fromkeys(scores, 0.6 if mode is TrainingMode.MIXED else 0.5)

    found = examine(Good(), hooks=Hooks(divide=generous))
    assert [problem.what for problem in found.problems.values()] == ["mode mixed pays 1.2 of a pool of 1"]


def test_progress_is_told_before_every_play() -> None:
    told: list[str] = []
    found = examine(Good(), hooks=Hooks(progress=told.append))
    assert told[0] == "drawing tasks"
    assert "task 'train-a', language zh, a leader is heard" in told
    assert len(told) > 0.9 * found.plays


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
