"""The public goods game: payoffs by hand, its equilibrium and optimum, exact figures against all plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.modes.competitive import shares as by_rank
from coterie.modes.cooperative import shares as together
from coterie.scenarios.base import build_scenario
from coterie.scenarios.public_goods import PublicGoods, PublicGoodsOptions
from tests.support.plays import drawn_policy, over_all_plays, pure
from tests.support.tables import exact, first_task, play


def goods(**options: Any) -> PublicGoods:
    return PublicGoods(PublicGoodsOptions.model_validate(options))


def gifts(*rounds: Sequence[int]) -> Any:
    """An `answer` by which player i gives rounds[t][i - 1] in round t."""
    turns = {f"player_{i}": iter(given) for i, given in enumerate(zip(*rounds, strict=True), start=1)}
    return lambda seat, seen, choices, rng: str(next(turns[seat]))


def test_payoffs_by_hand() -> None:
    outcome, _ = play(goods(), answer=gifts([3, 1, 0]))
    # 4 points doubled are 8, 8/3 each; kept are 0, 2 and 3
    payoffs = [8 / 3, 2 + 8 / 3, 3 + 8 / 3]
    # least: all three given alone, 0 + 2; greatest: none given of one's own, 3 + 4
    assert list(outcome.scores.values()) == pytest.approx([(p - 2) / (7 - 2) for p in payoffs])
    assert outcome.metrics["contribution"] == pytest.approx(4 / 9)
    assert outcome.metrics["efficiency"] == pytest.approx(sum(payoffs) / 18)
    assert outcome.metrics["player_1_contribution"] == 1
    assert outcome.metrics["player_2_contribution"] == pytest.approx(1 / 3)
    a, b, c = payoffs
    assert outcome.metrics["equality"] == pytest.approx(1 - (2 * (b - a) + 2 * (c - b) + 2 * (c - a)) / (2 * 3 * 13))


def test_nobody_gives_and_everybody_gives() -> None:
    nothing, _ = play(goods(), answer=gifts([0, 0, 0]))
    everything, _ = play(goods(), answer=gifts([3, 3, 3]))
    assert nothing.metrics["efficiency"] == pytest.approx(1 / 2)
    assert everything.metrics["efficiency"] == everything.metrics["contribution"] == 1
    assert nothing.metrics["equality"] == everything.metrics["equality"] == 1
    assert sum(everything.scores.values()) > sum(nothing.scores.values())


def test_giving_all_makes_the_unequal_equal() -> None:
    scenario = goods(endowment=[2, 3, 4])
    nothing, table = play(scenario, answer=gifts([0, 0, 0]))
    everything, _ = play(scenario, answer=gifts([2, 3, 4]))
    assert [table[seat].shown[0].system[:17] for seat in table.seats] == [f"You have {n} points" for n in (2, 3, 4)]
    assert [scenario.question(i, (), "en").choices[-1] for i in range(3)] == ["2", "3", "4"]
    # payoffs 2, 3, 4 and 6, 6, 6; least: 2 given alone, 2 * 2 / 3; greatest: 4 kept and the others' 5 doubled
    low, high = 4 / 3, 4 + 10 / 3
    assert list(nothing.scores.values()) == pytest.approx([(p - low) / (high - low) for p in (2, 3, 4)])
    assert nothing.metrics["equality"] == pytest.approx(1 - 4 / 27)
    assert everything.metrics["equality"] == pytest.approx(1)
    assert (nothing.metrics["efficiency"], everything.metrics["efficiency"]) == pytest.approx((0.5, 1))
    rich, _ = play(scenario, answer=gifts([0, 0, 4]))
    assert rich.metrics["contribution"] == pytest.approx(4 / 9), "of all points there are"
    assert rich.metrics["player_3_contribution"] == 1
    given = exact(scenario, probabilities=pure(dict(zip(scenario.players, "234", strict=True))))
    assert given["nash_conv"] == pytest.approx(9 * (1 - 2 / 3)), "each keeps a third of a point it does not give"


def test_only_players_with_equal_points_are_alike() -> None:
    def claimed(scenario: PublicGoods) -> list[str | None]:
        return [seat.symmetric_with for seat in scenario.seats(first_task(scenario))]

    assert claimed(goods(endowment=[3, 3, 3])) == claimed(goods()) == [None, "player_1", "player_1"]
    assert claimed(goods(endowment=[3, 2, 3])) == [None, None, "player_1"]


def test_scores_reach_both_ends() -> None:
    outcome, _ = play(goods(players=2, multiplier=1.5), answer=gifts([3, 0]))
    assert outcome.scores == {"player_1": 0.0, "player_2": 1.0}


def test_rounds_are_averaged_and_remembered() -> None:
    scenario = goods(rounds=3, memory=2)
    outcome, table = play(scenario, answer=gifts([1, 2, 0], [3, 0, 0], [0, 0, 0]))
    assert outcome.metrics["contribution"] == pytest.approx(6 / 27)
    assert [seen.user for seen in table["player_2"].shown] == [
        "First round.",
        "You gave 2, others 0 1.",
        "You gave 2, others 0 1.\nYou gave 0, others 0 3.",
    ]


def test_prompt_gives_the_rule_and_no_advice() -> None:
    question = goods().question(0, (), "en")
    assert (
        question.shown.system == "You have 3 points. Points given are multiplied by 2 and shared by all 3. Give 0 to 3."
    )
    assert question.choices == ("0", "1", "2", "3")
    assert goods().question(2, ((0, 1, 2),), "zh").shown.user == "你给2，其他人给0 1。"
    alike = {goods().question(i, ((2, 2, 2),), "en").shown for i in range(3)}
    assert len(alike) == 1, "the players are alike"


@pytest.mark.parametrize("rounds", [1, 3])
def test_giving_nothing_is_the_equilibrium_and_giving_all_the_optimum(rounds: int) -> None:
    scenario = goods(rounds=rounds)
    nothing = exact(scenario, probabilities=pure(dict.fromkeys(scenario.players, "0")))
    everything = exact(scenario, probabilities=pure(dict.fromkeys(scenario.players, "3")))
    assert nothing["nash_conv"] == pytest.approx(0)
    assert nothing["contribution"] == nothing["nash_contribution"] == 0
    assert everything["efficiency"] == pytest.approx(1)
    # each of three keeps its 3 points and loses 2 of every 3 it no longer gives
    assert everything["nash_conv"] == pytest.approx(3 * 3 * (1 - 2 / 3))


def test_beyond_the_dilemma_giving_pays() -> None:
    scenario = goods(players=2, multiplier=3)
    everything = exact(scenario, probabilities=pure({"player_1": "3", "player_2": "3"}))
    assert everything["nash_conv"] == pytest.approx(0)
    assert everything["nash_contribution"] == 1
    wasteful = goods(multiplier=0.5)
    shrinking = exact(wasteful, probabilities=pure(dict.fromkeys(wasteful.players, "0")))
    assert shrinking["efficiency"] == pytest.approx(1)


def test_nash_conv_of_one_round_is_what_giving_costs() -> None:
    scenario = goods(players=4, endowment=2, multiplier=1.6)
    figures = exact(scenario, probabilities=drawn_policy(5))
    given = 4 * 2 * figures["contribution"]
    assert figures["nash_conv"] == pytest.approx(given * (1 - 1.6 / 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"players": 2, "endowment": 1, "rounds": 3, "memory": 1},
        {"players": 2, "endowment": 1, "rounds": 3, "memory": 2},
        {"players": 3, "endowment": 1, "rounds": 2, "memory": 0},
        {"endowment": [2, 1, 3]},
        {"players": 2, "endowment": [1, 2], "rounds": 2},
    ],
)
def test_exact_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = goods(**options), drawn_policy(1)
    expected = over_all_plays(scenario, policy)
    found = exact(scenario, probabilities=policy)
    assert {name: found[name] for name in expected if name in found} == pytest.approx(
        {name: value for name, value in expected.items() if not name.startswith("score/")}
    )


def test_best_response_to_one_who_repays_is_to_give() -> None:
    scenario = goods(players=2, endowment=1, multiplier=1.5, rounds=10)
    # gives what the other gave last: worth more over nine rounds than the quarter point a gift costs
    repays = {h: ([0, 1] if not h or h[-1][0] else [1, 0]) for h in scenario._histories()}
    # gives in nine rounds (1.5 each), keeps in the last (1.75)
    assert scenario.best_response(0, [repays, repays]) == pytest.approx((9 * 1.5 + 1.75) / 10)


def test_what_the_modes_pay_for() -> None:
    scenario = goods()
    scores = {}
    for own in range(4):
        outcome, _ = play(scenario, answer=gifts([own, 2, 2]))
        scores[own] = outcome.scores
    for own in range(3):
        assert together(scores[own])["player_1"] < together(scores[own + 1])["player_1"]
        assert by_rank(scores[own])["player_1"] >= by_rank(scores[own + 1])["player_1"]


def test_scripts() -> None:
    scenario = goods(rounds=2)
    for name, share in (("give_all", 1), ("give_nothing", 0)):
        script = scenario.scripts[name]
        outcome, _ = play(scenario, answer=lambda seat, seen, choices, rng, script=script: script(seen, choices, rng))
        assert outcome.metrics["contribution"] == share


def test_too_much_to_compute_is_said() -> None:
    with pytest.raises(ScenarioError, match="too many to compute exactly"):
        exact(goods(players=5, rounds=10, memory=3))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="players"):
        build_scenario("public_goods", {"players": 1})
    with pytest.raises(ConfigError, match="2 numbers for 3 players"):
        build_scenario("public_goods", {"endowment": [2, 3]})
    with pytest.raises(ConfigError, match="endowment"):
        build_scenario("public_goods", {"endowment": [2, 3, 0]})
    with pytest.raises(ConfigError, match="multiplier"):
        build_scenario("public_goods", {"multiplier": 0})
