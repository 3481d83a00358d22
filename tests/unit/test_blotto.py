"""Blotto for two and for teams: battles by hand, known equilibria, exact figures against all plays."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.blotto import Blotto, BlottoOptions, allocations, margin, name
from coterie.scenarios.team_blotto import TeamBlotto, TeamBlottoOptions
from coterie.types import ADVICE, DECISION, ModelRole, Observation, TrainingMode
from tests.support.plays import drawn_policy, over_all_plays, pure
from tests.support.tables import cards, exact, first_task, play, saying

SEATS = ("red_1", "red_2", "blue_1", "blue_2")
LED = cards(
    dict(zip(SEATS, (ModelRole.LEADER, ModelRole.FOLLOWER) * 2, strict=True)),
    dict(zip(SEATS, ("red", "red", "blue", "blue"), strict=True)),
)


def blotto(**options: Any) -> Blotto:
    return Blotto(BlottoOptions.model_validate(options))


def team(**options: Any) -> TeamBlotto:
    return TeamBlotto(TeamBlottoOptions.model_validate({"battles": 1, **options}))


def inside(listener: Any, speaker: Any) -> bool:
    """Teams are heard by themselves."""
    return bool(listener.team == speaker.team)


# -- two commanders ---------------------------------------------------------------------------------------------------


def test_allocations_and_their_names() -> None:
    assert allocations(2, 3) == [(2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 2, 0), (0, 1, 1), (0, 0, 2)]
    assert [name(a) for a in allocations(2, 3)] == ["11", "12", "13", "22", "23", "33"]
    assert len(allocations(4, 5)) == math.comb(8, 4)
    assert margin((2, 1, 0), (0, 2, 0)) == 0
    assert margin((1, 1, 0), (0, 0, 2)) == 1


@pytest.mark.parametrize(
    ("first", "second", "battle", "fields"),
    [("1122", "1133", 0.5, 0.5), ("1123", "1111", 1, 4 / 6), ("1111", "2233", 0, 2 / 6), ("1223", "1223", 0.5, 0.5)],
)
def test_a_battle_by_hand(first: str, second: str, battle: float, fields: float) -> None:
    for score, expected in (("battle", battle), ("fields", fields)):
        outcome, _ = play(blotto(score=score), answer=saying({"first": first, "second": second}))
        assert outcome.scores == pytest.approx({"first": expected, "second": 1 - expected})


def test_two_fields_have_nothing_to_win() -> None:
    # what one takes the other gives up: every pair of allocations is a draw
    figures = exact(blotto(fields=2, troops=5), probabilities=drawn_policy(0))
    assert figures["nash_conv"] == pytest.approx(0)
    assert figures["first_score"] == pytest.approx(0.5)


def test_one_troop_is_a_draw_and_predictable_spreading_is_beaten() -> None:
    assert exact(blotto(troops=1))["nash_conv"] == pytest.approx(0)
    scenario = blotto(troops=3)
    # to beat 1-1-1 two fields must be taken, which takes four troops
    assert exact(scenario, probabilities=pure({"first": "123", "second": "123"}))["nash_conv"] == 0
    # 0-2-2 takes two fields from 4-0-0
    lumps = exact(blotto(troops=4), probabilities=pure({"first": "1111", "second": "1111"}))
    assert lumps["nash_conv"] == 1
    assert lumps["first_exploitability"] == lumps["second_exploitability"] == 0.5


def test_exact_is_the_sum_over_all_plays() -> None:
    scenario, policy = blotto(), drawn_policy(4)
    found, expected = exact(scenario, probabilities=policy), over_all_plays(scenario, policy)
    assert found["first_score"] == pytest.approx(expected["score/first"])
    assert found["spread"] == pytest.approx(expected["spread"])
    best = [
        over_all_plays(
            scenario, lambda seat, seen, choices, own=own: policy(seat, seen, choices)
            if seat == "second" else [float(choice == own) for choice in choices]
        )["score/first"]
        for own in ("1123", "1122", "1223", "1133", "2233", "1233")
    ]  # fmt: skip
    assert max(best) <= found["second_exploitability"] + 0.5 + 1e-9


def test_scripts_are_allocations() -> None:
    scenario = blotto()
    outcome, table = play(
        scenario, answer=lambda seat, seen, choices, rng: scenario.scripts["even"](seen, choices, rng)
    )
    assert {turn.text for seat in table.seats for turn in table[seat].turns} <= {"1123", "1223", "1233"}
    assert outcome.metrics["spread"] == 3


def test_too_many_allocations_are_refused() -> None:
    for scenario in ("blotto", "team_blotto"):
        with pytest.raises(ConfigError, match="allocations; at most"):
            build_scenario(scenario, {"fields": 9, "troops": 6})


# -- teams ------------------------------------------------------------------------------------------------------------


def test_team_mates_add_up() -> None:
    quiet = {"cooperation_level": 0.0}
    said = {"red_1": "12", "red_2": "34", "blue_1": "11", "blue_2": "12"}
    outcome, table = play(team(**quiet), answer=saying(said))
    # 1-1-1-1-0 against 3-1-0-0-0: one lost, one even, two taken
    assert outcome.scores == dict(zip(SEATS, (1, 1, 0, 0), strict=True))
    assert outcome.metrics["red_covered"] == 4
    assert outcome.metrics["blue_covered"] == 2
    assert outcome.metrics["red_wins"] == outcome.metrics["red_battles"] == 1
    assert [seen.user for seen in table["red_2"].shown] == ["Partner: unknown"]


def test_four_different_fields_cannot_be_beaten() -> None:
    quiet = {"cooperation_level": 0.0}
    spread = exact(team(**quiet), probabilities=pure(dict(zip(SEATS, ("12", "34") * 2, strict=True))))
    assert spread["red_exploitability"] == spread["blue_exploitability"] == 0
    assert spread["draws"] == 1
    doubled = exact(team(**quiet), probabilities=pure(dict(zip(SEATS, ("12", "34", "12", "12"), strict=True))))
    assert doubled["blue_exploitability"] == 0.5
    # against a team that draws its fields, four different fields win more than a third and never lose
    even = [1 / 15] * 15
    mixed = exact(
        team(**quiet, battles=7),
        probabilities=lambda seat, seen, choices: (
            even if seat.startswith("blue") else pure({"red_1": "12", "red_2": "34"})(seat, seen, choices)
        ),
    )
    assert mixed["red_battle_wins"] == pytest.approx(0.36)
    assert mixed["blue_battle_wins"] == pytest.approx(0)
    assert mixed["red_wins"] == pytest.approx(1 - 0.64**7)


def test_a_leaders_plan_is_its_move_and_is_heard_by_its_follower_alone() -> None:
    said = {"red_1": "12", "red_2": "34", "blue_1": "15", "blue_2": "23"}
    _, table = play(team(), answer=saying(said), cards=LED, mode=TrainingMode.TEAM_BATTLE, hearing=inside)
    assert [turn.kind for turn in table["red_1"].turns] == [DECISION]
    assert [seen.user for seen in table["red_2"].shown] == ["Partner: 12"]
    assert [seen.user for seen in table["blue_2"].shown] == ["Partner: 15"]
    assert [len(table[seat].turns) for seat in SEATS] == [1] * 4


def test_without_a_leader_all_say_a_plan_that_binds_nobody() -> None:
    mates = cards(
        dict.fromkeys(SEATS, ModelRole.TEAMMATE), dict(zip(SEATS, ("red", "red", "blue", "blue"), strict=True))
    )
    said = {"red_1": ["12", "13"], "red_2": ["34", "45"], "blue_1": ["11", "12"], "blue_2": ["11", "12"]}
    outcome, table = play(team(), answer=saying(said), cards=mates, hearing=inside)
    assert [turn.kind for turn in table["red_1"].turns] == [ADVICE, "move"]
    assert [seen.prefix for seen in table["red_1"].shown] == ["Plan:", "Send:"]
    assert table["red_1"].shown[1].user == "Partner: 34"
    assert outcome.metrics["red_covered"] == 4
    _, table = play(team(), answer=saying(said), cards=mates, hearing=inside, withheld=["red_2"])
    assert table["red_1"].shown[1].user == "Partner: unknown"
    assert table["red_2"].shown[1].user == "Partner: 12"


def test_plans_never_cross_sides() -> None:
    """Even where the mode lets everybody hear everybody."""
    said = {seat: ["12", "12"] if seat.startswith("red") else ["45", "45"] for seat in SEATS}
    _, table = play(team(), answer=saying(said))
    assert {seen.user for seat in SEATS[:2] for seen in table[seat].shown[1:]} == {"Partner: 12"}
    assert {seen.user for seat in SEATS[2:] for seen in table[seat].shown[1:]} == {"Partner: 45"}


@pytest.mark.parametrize(
    ("options", "seating"),
    [
        ({"fields": 2, "troops": 1, "battles": 2, "cooperation_level": 0.0}, {}),
        ({"fields": 3, "troops": 1, "cooperation_level": 0.0}, {}),
        ({"fields": 2, "troops": 1}, {}),
        ({"fields": 2, "troops": 1}, {"withheld": ["red_1"]}),
        ({"fields": 3, "troops": 1}, {"cards": LED, "hearing": inside}),
    ],
)
def test_exact_odds_are_the_sum_over_all_plays(options: dict[str, Any], seating: dict[str, Any]) -> None:
    scenario, policy = team(**options), drawn_policy(7, sharp=2)
    expected = over_all_plays(scenario, policy, **seating)
    found = exact(scenario, probabilities=policy, **seating)
    metrics = {key: value for key, value in expected.items() if not key.startswith("score/")}
    assert {key: found[key] for key in metrics} == pytest.approx(metrics)
    assert found["red_battles"] == pytest.approx(expected["score/red_2"])


def test_the_better_partner_shows_in_the_odds() -> None:
    """A seat may be held by anyone: exact figures are those of whoever sits there."""
    scenario = team(cooperation_level=0.0)
    at_home = exact(scenario, probabilities=pure(dict(zip(SEATS, ("12", "34", "11", "12"), strict=True))))
    swapped = exact(scenario, probabilities=pure(dict(zip(SEATS, ("12", "12", "11", "34"), strict=True))))
    assert at_home["red_wins"] == swapped["blue_wins"] == 1


def test_symmetric_seats_may_be_swapped() -> None:
    seats = team().seats(first_task(team()))
    assert [seat.symmetric_with for seat in seats] == [None, "red_1", None, "blue_1"]


def test_scripts_keep_to_their_fields() -> None:
    scenario = team(troops=3)
    seen = Observation(user="Partner: unknown")
    picks = {key: scenario.scripts[key](seen, scenario.names, None) for key in ("low", "high")}  # type: ignore[arg-type]
    assert picks == {"low": "123", "high": "345"}


def test_too_many_plans_are_said() -> None:
    with pytest.raises(ScenarioError, match="too many to compute exactly"):
        exact(team(fields=6, troops=3))
