"""Bargaining: payoffs by hand, the fair and efficient division, exact figures against all plays."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.bargaining import Bargaining, BargainingOptions
from coterie.scenarios.base import build_scenario
from coterie.types import Split, TrainingTask
from tests.support.plays import drawn_policy, over_all_plays
from tests.support.tables import exact, make_task, play, saying


def bargaining(**options: Any) -> Bargaining:
    return Bargaining(BargainingOptions.model_validate(options))


def values(first: list[int], second: list[int]) -> TrainingTask:
    return make_task(content={"first": first, "second": second}, max_steps=6)


def test_an_offer_taken_at_once() -> None:
    outcome, table = play(bargaining(), values([5, 3, 1], [1, 3, 5]), answer=saying({"first": "AB", "second": "yes"}))
    assert table["first"].shown[0].user == "Worth to you: A 5, B 3, C 1.\nOffer: nothing yet."
    assert table["second"].shown[0].user == "Worth to you: A 1, B 3, C 5.\nOffer: you get C."
    assert outcome.scores == pytest.approx({"first": 8 / 9, "second": 5 / 9})
    assert outcome.metrics["nash_product"] == pytest.approx(40 / 81)
    assert outcome.metrics["nash_efficiency"] == outcome.metrics["agreement"] == outcome.metrics["pareto"] == 1
    assert outcome.metrics["welfare"] == pytest.approx(1)
    assert outcome.metrics["offers"] == 1


def test_a_counter_offer_and_a_refusal() -> None:
    said = {"first": ["ABC", "no"], "second": "BC"}
    outcome, table = play(bargaining(), values([5, 3, 1], [1, 3, 5]), answer=saying(said))
    assert [seen.user.splitlines()[1] for seen in table["first"].shown] == ["Offer: nothing yet.", "Offer: you get A."]
    assert table["first"].shown[1].prefix == "Answer:"
    assert table["second"].shown[0].user.endswith("Offer: you get none.")
    assert outcome.scores == {"first": 0, "second": 0}
    assert set(outcome.metrics.values()) == {0.0, 2.0}
    said["first"] = ["ABC", "yes"]
    outcome, _ = play(bargaining(discount=0.9), values([5, 3, 1], [1, 3, 5]), answer=saying(said))
    assert outcome.scores == pytest.approx({"first": 0.9 * 5 / 9, "second": 0.9 * 8 / 9})
    assert outcome.metrics["pareto"] == 1, "no other division of that time is better"


def test_a_wasteful_division() -> None:
    said = {"first": "C", "second": "yes"}
    outcome, _ = play(bargaining(), values([5, 3, 1], [1, 3, 5]), answer=saying(said))
    assert outcome.scores == pytest.approx({"first": 1 / 9, "second": 4 / 9})
    assert outcome.metrics["pareto"] == 0
    assert outcome.metrics["welfare"] == pytest.approx(5 / 13)
    # fair and efficient: first keeps A and B, or A alone; both give 40 / 81
    assert outcome.metrics["nash_efficiency"] == pytest.approx(4 / 40)


def test_the_ultimatum_game_has_one_offer() -> None:
    scenario = bargaining(offers=1)
    _, table = play(scenario, values([5, 3, 1], [5, 3, 1]), answer=saying({"first": "A", "second": "no"}))
    assert [len(table[seat].turns) for seat in table.seats] == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"offers": 1, "values": [2, 1]},
        {"offers": 2, "values": [2, 1], "discount": 0.8},
        {"offers": 3, "values": [4, 1]},
    ],
)
def test_exact_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = bargaining(**options), drawn_policy(8)
    tasks = [values(list(first), list(second)) for first, second in scenario.pairs()]
    expected = over_all_plays(scenario, policy, tasks)
    found = exact(scenario, probabilities=policy)
    metrics = {name: value for name, value in expected.items() if not name.startswith("score/")}
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    assert found["first_payoff"] == pytest.approx(expected["score/first"])
    assert found["second_payoff"] == pytest.approx(expected["score/second"])


def test_pairs_of_values_are_trained_on_or_held_out() -> None:
    scenario = bargaining()
    train, heldout = set(scenario.pairs(Split.TRAIN)), set(scenario.pairs(Split.HELDOUT))
    assert not train & heldout
    assert train | heldout == set(scenario.pairs())
    assert (len(train), len(heldout)) == (27, 9)
    assert len(set(bargaining(values=[1, 2]).pairs(Split.HELDOUT))) == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_fair_players_agree_on_something_fair(language: str) -> None:
    scenario = bargaining()
    fair = scenario.scripts["fair"]
    answer = lambda seat, seen, choices, rng: fair(seen, choices, rng)  # noqa: E731
    outcome, _ = play(scenario, values([5, 3, 1], [1, 3, 5]), answer=answer, language=language)
    assert outcome.metrics["agreement"] == 1
    assert min(outcome.scores.values()) >= 0.5
    clash, _ = play(scenario, values([5, 3, 1], [5, 3, 1]), answer=answer, language=language)
    assert clash.metrics["agreement"] == 0, "both want the same half"


def test_prompts_in_chinese() -> None:
    scenario = bargaining()
    question = scenario.question(1, (5, 1, 3), (True, False, True), False, "zh")
    assert question.shown.user == "对你值：甲 5，乙 1，丙 3。\n提议：你得甲丙。"
    assert question.choices == ("同意", "无", "丙", "乙", "乙丙", "甲", "甲丙", "甲乙", "甲乙丙")


def test_users_tasks_and_options_are_checked() -> None:
    scenario = bargaining()
    scenario.check_task(make_task())
    for wrong in ([5, 3], [5, 3, 3], None, "531"):
        with pytest.raises(ScenarioError, match="in any order"):
            scenario.check_task(make_task(content={"first": [5, 3, 1], "second": wrong}))
    for options in ({"values": [1]}, {"values": [2, 2]}, {"values": [0, 1]}, {"offers": 0}):
        with pytest.raises(ConfigError, match="options"):
            build_scenario("bargaining", options)
