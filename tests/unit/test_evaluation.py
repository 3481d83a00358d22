"""Evaluation: three kinds of player on the same held-out tasks, and the table that tells them apart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.evaluation import PLAYERS, Evaluation, Evaluator
from coterie.models import LoRAModel, ModelConfig
from coterie.rollout.calibration import Calibration
from coterie.rollout.runner import Runner
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import (
    AdapterVersion,
    GenerateRequest,
    Generation,
    Observation,
    Outcome,
    Seat,
    Split,
    TaskType,
    Tier,
    TrainingTask,
)
from tests.support.engines import LogitEngine, Words, make_services

CHAT = Words()
YES, NO = CHAT.id("yes"), CHAT.id("no")
CHOICES = ("yes", "no")


class Quiz:
    """Two seats answer yes or no. Held-out: 40 tasks of two types; "yes" is right in the even ones."""

    Options = ScenarioOptions
    judged = True
    single_task = False
    broken: str | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        for number in range(40):
            kind = TaskType.REASONING if number % 4 < 2 else TaskType.CLASSIFICATION
            yield TrainingTask(f"{split}-{seed}-{number}", kind, required_models=2, content={"n": number}, split=split)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat("one"), Seat("two")]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        if task.task_id == self.broken:
            raise ValueError("torn page")
        shown = Observation(user=f"q{task.content['n']}")
        turns = {seat: await table[seat].act(shown, choices=CHOICES) for seat in table.seats}
        right = {seat: float(turn.choice == task.content["n"] % 2) for seat, turn in turns.items()}
        return Outcome({s: v / 2 for s, v in right.items()}, right if self.judged else {}, {"agreed": 1.0})


class Exact(Quiz):
    """Can also tell how likely seat one says yes, without playing."""

    async def exact(self, table: Table) -> Mapping[str, float]:
        return {"yes": (await table["one"].distribution(Observation(user="q0"), CHOICES))[0]}


class Learned(LogitEngine):
    """The base says yes; an adapter of version 1 or later knows the answer to every question."""

    async def generate(self, request: GenerateRequest) -> Generation:
        trained = request.adapter is not None and request.adapter.version > 0
        question = next(n for n in range(40) if CHAT.id(f"q{n}") in request.prompt_ids)
        right = YES if question % 2 == 0 else NO
        self.logit = lambda prefix, token: 9.0 if token == (right if trained else YES) else 0.0
        return await super().generate(request)


def evaluator(quiz: Quiz, engine: LogitEngine | None = None, temperature: float = 0.0, **services: Any) -> Evaluator:
    models = [LoRAModel(ModelConfig(model_id=name), version=2) for name in ("a", "b")]
    where = Runner(quiz, make_services(engine or Learned(), CHAT, temperature=1.0, **services))
    return Evaluator(where, models, seed=5, rotate=False, temperature=temperature)


def measured(quiz: Quiz, count: int = 8, engine: LogitEngine | None = None, **services: Any) -> Evaluation:
    return asyncio.run(evaluator(quiz, engine, **services).all(count, Split.HELDOUT, lambda *told: None))


def test_all_three_play_the_same_tasks_greedily_under_their_own_weights() -> None:
    engine = Learned()
    bias = {YES: -1.0, NO: 1.0}
    calibration = Calibration({(seat, CHOICES): bias for seat in ("one", "two")})
    found = measured(Quiz(), engine=engine, calibration=calibration)
    assert found.tasks == 8
    assert tuple(found.measured) == PLAYERS
    thirds = [engine.requests[i * 16 : (i + 1) * 16] for i in range(3)]
    assert len(engine.requests) == 48
    assert [[r.prompt_ids for r in third] for third in thirds] == [[r.prompt_ids for r in thirds[0]]] * 3
    assert {r.temperature for r in engine.requests} == {0.0}
    assert [{r.adapter for r in third} for third in thirds] == [
        {None}, {None}, {AdapterVersion("a", 2), AdapterVersion("b", 2)},
    ]  # fmt: skip
    assert [all(r.bias is None for r in third) for third in thirds] == [True, False, False]
    assert {tuple((r.bias or {}).items()) for third in thirds[1:] for r in third} == {tuple(bias.items())}


def test_play_is_sampled_where_a_temperature_is_set() -> None:
    engine = Learned()
    asyncio.run(evaluator(Quiz(), engine, temperature=0.7).all(2, Split.HELDOUT, lambda *told: None))
    assert {request.temperature for request in engine.requests} == {0.7}


def test_accuracy_is_split_by_type_and_model() -> None:
    found = measured(Quiz())
    base, trained = found.measured["bare base"], found.measured["trained"]
    # always yes is right in every second task
    assert base.by_model == {"a": 0.5, "b": 0.5}
    assert set(base.by_cell) == {(t, m) for t in ("classification", "reasoning") for m in "ab"}
    assert base.mean == 0.5
    assert set(trained.by_cell.values()) == {1.0}
    assert trained.outcome == {"agreed": 1.0}
    table = found.table()
    assert table.columns == ("task type", "model", "bare base", "calibrated base", "trained", "gain")
    assert table.rows[-1] == ("all", "mean of all models", 0.5, 0.5, 1.0, 0.5)
    assert len(table.rows) == 5
    assert "8 tasks" in table.title


def test_calibration_alone_changes_the_middle_column_only() -> None:
    flip = Calibration({(seat, CHOICES): {YES: -20.0} for seat in ("one", "two")})
    plain, flipped = measured(Quiz(), 2), measured(Quiz(), 2, calibration=flip)
    assert flipped.measured["bare base"] == plain.measured["bare base"]
    assert plain.measured["calibrated base"].mean == 0.5
    assert flipped.measured["calibrated base"].mean == 0.5
    by_task = [measured(Quiz(), n, calibration=flip).measured["calibrated base"].mean for n in (1, 2)]
    assert by_task == [0.0, 0.5]  # now the first task, whose answer is yes, is missed


def test_without_right_answers_scores_are_shown() -> None:
    quiz = Quiz()
    quiz.judged = False
    assert measured(quiz).measured["trained"].mean == 0.5  # a right answer scores one half


def test_exact_figures_stand_in_the_table_for_every_player() -> None:
    found = measured(Exact(), calibration=Calibration({("one", CHOICES): {YES: -9.0}}))
    figures = [found.measured[player].exact["yes"] for player in PLAYERS]
    assert figures == pytest.approx([1.0, 0.5, 0.5], abs=0.001)
    last = found.table().rows[-1]
    assert last[:2] == ("exact", "yes")
    assert last[2:] == pytest.approx((*figures, figures[2] - figures[0]))


def test_exact_figures_of_the_current_policies_are_to_be_had_alone() -> None:
    engine = Learned()
    assert asyncio.run(evaluator(Exact(), engine).exact()) == pytest.approx({"yes": 1.0}, abs=0.001)
    assert {r.adapter for r in engine.requests} == {AdapterVersion("a", 2)}
    assert asyncio.run(evaluator(Quiz()).exact()) == {}


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (float("nan"), "exact figure 'yes' is nan; it must be a finite number"),
        ("much", "exact figure 'yes' is 'much'"),
        (None, r"exact raised ZeroDivisionError: no figure \(test_evaluation.py:\d+ in exact\)"),
    ],
)
def test_exact_figures_that_are_none_are_named(figure: Any, said: str) -> None:
    class Odd(Exact):
        async def exact(self, table: Table) -> Any:
            if figure is None:
                raise ZeroDivisionError("no figure")
            return {"yes": figure}

    with pytest.raises(ScenarioError, match=said):
        asyncio.run(evaluator(Odd()).exact())


def test_progress_counts_all_players_and_ends_at_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    asyncio.run(evaluator(Quiz()).all(40, Split.HELDOUT, lambda *step: told.append(step)))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("evaluating trained", 120, 120)
    assert len(told) == 6  # two parts each
    assert {text for text, _, _ in told} == {f"evaluating {player}" for player in PLAYERS}


def test_no_more_tasks_than_there_are() -> None:
    assert measured(Quiz(), 1000).tasks == 40


def test_a_task_that_fails_is_named() -> None:
    quiz = Quiz()
    quiz.broken = "heldout-5-3"
    with pytest.raises(ScenarioError, match="held-out task 'heldout-5-3' failed: ValueError: torn page"):
        measured(quiz)
    assert measured(quiz, 3).tasks == 3


def test_a_few_tasks_may_fail_and_are_left_out() -> None:
    quiz = Quiz()
    quiz.broken = "heldout-5-3"
    where = evaluator(quiz)
    where.max_failed_share = 0.1
    found = asyncio.run(where.all(10, Split.HELDOUT, lambda *told: None))
    assert {player: m.failed for player, m in found.measured.items()} == dict.fromkeys(PLAYERS, 1)
    assert found.as_dict()["players"]["trained"]["failed"] == 1
    assert "(up to 1 failed and are left out)" in found.table().plain()
    with pytest.raises(ScenarioError, match=r"1 of 9 failed, more than rollout.max_failed_share \(0.1\) allows"):
        asyncio.run(where.all(9, Split.HELDOUT, lambda *told: None))


def test_more_models_than_seats_are_all_measured() -> None:
    where = evaluator(Quiz())
    where.models = [LoRAModel(ModelConfig(model_id=f"m{i}")) for i in range(5)]
    found = asyncio.run(where.all(10, Split.HELDOUT, lambda *told: None))
    for player in PLAYERS:
        assert set(found.measured[player].by_model) == {f"m{i}" for i in range(5)}


def test_as_dict_is_plain_json() -> None:
    found = measured(Exact())
    data = json.loads(json.dumps(found.as_dict()))
    assert data == found.as_dict()
    assert data["players"]["trained"]["by_task_type"]["reasoning"] == {"a": 1.0, "b": 1.0}
    assert data["players"]["trained"]["exact"].keys() == {"yes"}


def test_tasks_that_training_has_too_are_not_called_held_out() -> None:
    assert measured(Quiz()).table().title == "Held-out accuracy on 8 tasks no training step saw"
    assert measured(Quiz(), count=1).table().title == "Held-out accuracy on 1 task no training step saw"
    scenario = Quiz()
    scenario.single_task = True
    assert measured(scenario).table().title == "Accuracy on 8 tasks training has too"
    trained_on = asyncio.run(evaluator(Quiz()).all(8, Split.TRAIN, lambda *told: None))
    assert trained_on.table().title == "Accuracy on 8 tasks training has too"


def test_figures_of_made_up_answers_are_labelled() -> None:
    honest = measured(Quiz())
    assert honest.simulated == 0.0
    assert "simulated" not in honest.as_dict()
    assert honest.table().title.startswith("Held-out")
    engine = Learned()
    engine.tier = Tier.SIMULATED
    found = measured(Quiz(), engine=engine)
    assert found.as_dict()["simulated"] == found.simulated == 1.0
    assert found.table().title.startswith("SIMULATED RESPONSES (100% of turns)")
