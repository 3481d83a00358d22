"""Laws of the tasks scenario that hold for every difficulty, seed and language, and for whatever a model answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.scenarios.practice import PracticeTable
from coterie.scenarios.tasks import Tasks, TasksOptions
from coterie.scenarios.tasks.kinds import KINDS
from coterie.scenarios.tasks.words import POOLS, translate
from coterie.types import Observation, SeatId, Split, TaskType, TrainingTask
from tests.support.tables import play

FEW = settings(max_examples=40)
LANGUAGES = ("en", "zh")
difficulty = st.integers(0, 1000).map(lambda n: n / 1000)
seed = st.integers(0, 10**6)
kind = st.sampled_from(sorted(TaskType))

FRAME = {"form", "labels", "limit", "mark"}
"""Keys of a task's content that say what kind of question it is; all others hold what is asked about."""


def held(content: Mapping[str, Any]) -> set[str | int]:
    """The words and numbers a task is about, in English. A classification's answer is one of its labels."""
    found: set[str | int] = set()

    def walk(value: object) -> None:
        if isinstance(value, Mapping):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)
        else:
            assert isinstance(value, str | int)
            found.add(value)

    labels = content.get("labels", ())
    walk({k: v for k, v in content.items() if k not in FRAME and not (k == "answer" and v in labels)})
    return found


def test_no_word_stands_on_both_sides_whichever_pool_it_is_in() -> None:
    for language in LANGUAGES:
        sides = {
            split: {translate(english, language) for pool in POOLS.values() for english, _ in pool[split]}
            for split in Split
        }
        assert not sides[Split.TRAIN] & sides[Split.HELDOUT]


def test_a_word_means_one_thing_in_chinese() -> None:
    pairs = {pair for pool in POOLS.values() for side in pool.values() for pair in side}
    assert len({english for english, _ in pairs}) == len(pairs)
    assert len({chinese for _, chinese in pairs}) == len(pairs)


@FEW
@given(seed, seed)
def test_held_out_tasks_are_about_nothing_a_training_task_was_about(one: int, other: int) -> None:
    scenario = Tasks(TasksOptions())
    train = [held(task.content) for task in islice(scenario.tasks(Split.TRAIN, one), 40)]
    heldout = [held(task.content) for task in islice(scenario.tasks(Split.HELDOUT, other), 40)]
    assert all(train)
    assert all(heldout)
    seen, unseen = set().union(*train), set().union(*heldout)
    assert not seen & unseen
    chinese = [{translate(str(word), "zh") for word in side} for side in (seen, unseen)]
    assert not chinese[0] & chinese[1]


@FEW
@given(kind, difficulty, seed, st.sampled_from(list(Split)), st.integers(1, 4))
def test_a_task_is_the_same_in_both_languages_and_its_right_answer_is_right(
    task_type: TaskType, hard: float, number: int, split: Split, seats: int
) -> None:
    made = KINDS[task_type].make(random.Random(number), hard, split, seats)
    assert made == KINDS[task_type].make(random.Random(number), hard, split, seats)
    rights = []
    for language in LANGUAGES:
        choices = KINDS[task_type].choices(made, language)
        if choices is None:
            continue
        assert len(set(choices)) == len(choices) > 1
        grades = [KINDS[task_type].accuracy(made, language, choice, True) for choice in choices]
        assert max(grades) == 1.0
        assert min(grades) == 0.0
        rights.append(grades)
        for seat in range(seats):
            question = KINDS[task_type].question(made, language, seat)
            assert question == question.strip()
            assert question
    assert len(rights) == (0 if task_type is TaskType.GENERATION else 2)
    assert rights[:1] == rights[1:]  # the same choice, by its place, is right in either language


@FEW
@given(difficulty, seed, st.sampled_from(LANGUAGES), st.text(max_size=40), st.booleans())
def test_any_text_is_graded_by_the_share_of_constraints_it_meets(
    hard: float, number: int, language: str, answer: str, ended: bool
) -> None:
    generation = KINDS[TaskType.GENERATION]
    made = generation.make(random.Random(number), hard, Split.TRAIN, 1)
    constraints = len(made["words"]) + 2
    for said in (answer, answer + made["mark"], " ".join([*made["words"], answer])):
        grade = generation.accuracy(made, language, said, ended)
        assert grade * constraints == pytest.approx(round(grade * constraints))
        assert 0 <= grade <= 1
        assert generation.accuracy(made, language, said, False) <= grade


@FEW
@given(kind, difficulty, seed, st.floats(0, 1), st.sampled_from(LANGUAGES), st.integers(1, 4))
def test_whatever_is_answered_a_score_is_accuracy_at_full_to_half_efficiency(
    task_type: TaskType, hard: float, number: int, level: float, language: str, models: int
) -> None:
    task = TrainingTask(
        f"t{number}", task_type, difficulty=hard, required_models=models, cooperation_level=level, max_steps=2
    )

    def anything(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        return rng.choice(choices) if choices else " ".join(rng.choices(["a", "b!", "云", "?"], k=rng.randint(1, 12)))

    outcome, table = play(Tasks(TasksOptions()), task, answer=anything, language=language, seed=number)
    assert set(outcome.scores) == set(outcome.accuracy) == set(table.seats)
    for seat in table.seats:
        assert 0 <= outcome.accuracy[seat] <= 1
        assert outcome.accuracy[seat] / 2 <= outcome.scores[seat] <= outcome.accuracy[seat]
        assert 1 <= len(table[seat].turns) <= 2


@FEW
@given(difficulty, seed, st.integers(2, 4))
def test_collaboration_cannot_be_solved_from_one_half_of_the_information(hard: float, number: int, seats: int) -> None:
    kind_ = KINDS[TaskType.COLLABORATION]
    made = kind_.make(random.Random(number), hard, Split.TRAIN, seats)
    for seat in range(seats):
        known = "item" if seat % 2 else "colour"
        unknown = "colour" if seat % 2 else "item"
        for value in made[f"{unknown}s"]:
            # whatever the other half is, this seat is asked the same, so nothing it sees tells it
            assert kind_.question({**made, unknown: value}, "en", seat) == kind_.question(made, "en", seat)
        others = [value for value in made[f"{known}s"] if value != made[known]]
        assert all(
            kind_.question({**made, known: value}, "en", seat) != kind_.question(made, "en", seat) for value in others
        )


@FEW
@given(kind, difficulty, st.text("abc", min_size=1, max_size=4), st.sampled_from(list(Split)))
def test_a_task_without_content_is_always_the_same(task_type: TaskType, hard: float, name: str, split: Split) -> None:
    task = TrainingTask(name, task_type, difficulty=hard, required_models=2, split=split)

    def shown() -> list[Observation]:
        scenario = Tasks(TasksOptions())
        table = PracticeTable(task, scenario.seats(task), answer=lambda s, o, c, rng: c[0] if c else "x")
        asyncio.run(scenario.play(task, table))
        return [seen for seat in table.seats for seen in table[seat].shown]

    assert shown() == shown()
