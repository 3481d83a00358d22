"""reasoning-gym: its own scorer judges, questions are made again from seed and index, sides share no question."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.reasoning_gym import CHUNK, ReasoningGym, ReasoningGymOptions
from coterie.scenarios.base import build_scenario
from coterie.types import Split, TaskType
from tests.support.tables import first_task, make_task, play, saying

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def gym(dataset: str = "chain_sum", **options: Any) -> ReasoningGym:
    return ReasoningGym(ReasoningGymOptions.model_validate({"dataset": dataset, **options}))


def prompts(scenario: ReasoningGym, split: Split, count: int, seed: int = 0) -> list[str]:
    return [scenario.question(task).prompt for task in islice(scenario.tasks(split, seed), count)]


def test_a_question_and_its_answer() -> None:
    scenario = gym(config=SMALL, suffix=" Number only.", max_tokens=4, system="Sums.", prefix="It is")
    task = first_task(scenario)
    question = scenario.question(task)
    assert question.prompt.endswith("= Number only.")
    terms = question.prompt.split(":")[1].split("=")[0]
    left, sign, right = terms.split()
    assert question.answer == str(int(left) + int(right) * (1 if sign == "+" else -1))
    assert (task.task_type, question.max_tokens, task.required_models) == (TaskType.REASONING, 4, 1)
    right_one, _ = play(scenario, task, answer=saying({"seat_1": f" {question.answer} "}))
    wrong_one, table = play(scenario, task, answer=saying({"seat_1": "no idea"}))
    assert right_one.accuracy == {"seat_1": 1.0}
    assert right_one.scores["seat_1"] > 0.8
    assert wrong_one.accuracy == {"seat_1": 0.0}
    assert (table["seat_1"].shown[0].system, table["seat_1"].shown[0].prefix) == ("Sums.", "It is")


def test_a_scorer_of_its_own_accepts_any_right_answer() -> None:
    scenario = gym("countdown", config={"min_numbers": 3, "max_numbers": 3})
    task = first_task(scenario)
    answer = scenario.question(task).answer
    for said, expected in ((answer, 1.0), (f"({answer})", 1.0), (f"{answer}+1", 0.01)):
        assert scenario.accuracy(task, scenario.question(task), play_turn(scenario, task, said)) == pytest.approx(
            expected, abs=0.05
        )


def play_turn(scenario: ReasoningGym, task: Any, said: str) -> Any:
    return play(scenario, task, answer=lambda seat, seen, choices, rng: said)[1]["seat_1"].turns[0]


def test_no_question_stands_on_both_sides_however_few_there_are() -> None:
    scenario = gym(config=SMALL, heldout_tasks=40)
    trained = set(prompts(scenario, Split.TRAIN, 600))
    held = prompts(scenario, Split.HELDOUT, 40)
    assert len(set(held)) == len(held), "each held-out question comes once"
    assert not trained & set(held)
    assert 10 < len(held) <= 40
    assert len(trained) > 3 * len(held) / 2
    assert set(prompts(scenario, Split.HELDOUT, 40, seed=1)).isdisjoint(prompts(scenario, Split.TRAIN, 600, seed=2))


def test_tasks_go_on_past_a_seed_and_come_back_the_same() -> None:
    scenario = gym(config=SMALL)
    tasks = list(islice(scenario.tasks(Split.TRAIN, 3), CHUNK + 10))
    assert len({task.content["seed"] for task in tasks}) == 2
    again = gym(config=SMALL)
    assert [again.question(task) for task in reversed(tasks)] == [scenario.question(task) for task in reversed(tasks)]
    assert list(islice(again.tasks(Split.TRAIN, 3), 20)) == tasks[:20]
    assert list(islice(again.tasks(Split.TRAIN, 4), 20)) != tasks[:20]


def test_data_sets_that_use_the_global_generators_disturb_nobody() -> None:
    before = random.getstate()
    scenario = gym("pool_matrix")
    first = [scenario.question(task) for task in islice(scenario.tasks(Split.TRAIN, 0), 5)]
    random.seed(5)
    assert [gym("pool_matrix").question(task) for task in islice(scenario.tasks(Split.TRAIN, 0), 5)] == first
    random.setstate(before)


def test_a_data_set_with_one_question_cannot_be_split() -> None:
    scenario = gym("chain_sum", config={**SMALL, "min_terms": 2}, heldout_share=1e-9)
    with pytest.raises(ScenarioError, match="none of 2000 questions of 'chain_sum' stands on the heldout side"):
        first_task(scenario, Split.HELDOUT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sums"}, "no data set 'chain_sums'.*did you mean 'chain_sum'"),
        ({"config": {"terms": 2}}, "chain_sum.*with config {'terms': 2}.*unexpected keyword"),
        ({"config": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"config": {"seed": 1}}, "config.seed is set by the scenario"),
        ({"heldout_share": 0}, "heldout_share"),
        ({"data_set": "x"}, "did you mean 'dataset'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("reasoning_gym", options)


def test_a_users_task() -> None:
    scenario = gym(config=SMALL)
    assert scenario.question(make_task()) == scenario.question(make_task())
    assert scenario.question(make_task()) != scenario.question(make_task(task_id="other one"))
    good = {"dataset": "chain_sum", "seed": 1, "index": 2}
    scenario.check_task(make_task(content=good))
    for change in ({"dataset": "countdown"}, {"index": CHUNK}, {"seed": -1}, {"seed": "1"}):
        with pytest.raises(ScenarioError, match="task 't': content must be"):
            scenario.check_task(make_task(content={**good, **change}))
