"""The common pool: stock by hand, known optimum, exact figures against all plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.modes.competitive import shares as by_rank
from coterie.modes.cooperative import shares as together
from coterie.scenarios.base import build_scenario
from coterie.scenarios.commons import Commons, CommonsOptions
from tests.support.plays import drawn_policy, over_all_plays, pure
from tests.support.tables import exact, first_task, play


def commons(**options: Any) -> Commons:
    return Commons(CommonsOptions.model_validate(options))


def demands(*rounds: Sequence[int]) -> Any:
    """An `answer` by which player i asks for rounds[t][i - 1] in round t."""
    turns = {f"player_{i}": iter(asked) for i, asked in enumerate(zip(*rounds, strict=True), start=1)}
    return lambda seat, seen, choices, rng: str(next(turns[seat]))


def scripted(scenario: Commons, *names: str) -> Any:
    players = dict(zip(scenario.players, names, strict=True))
    return play(scenario, answer=lambda seat, seen, choices, rng: scenario.scripts[players[seat]](seen, choices, rng))


def test_one_each_keeps_the_stock() -> None:
    outcome, table = scripted(commons(), *["share"] * 3)
    assert [seen.user for seen in table["player_1"].shown] == ["Stock: 6"] * 6
    # 18 were taken; knowing the end, all six could be taken in the last round: 5 * 3 + 6
    assert outcome.metrics["efficiency"] == pytest.approx(18 / 21)
    assert outcome.metrics["equality"] == outcome.metrics["survival"] == outcome.metrics["stock"] == 1
    assert outcome.metrics["sustainability"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 6) / 6 / 6)
    assert outcome.scores == pytest.approx(dict.fromkeys(table.seats, 6 / 12))


def test_two_each_is_the_tragedy() -> None:
    outcome, table = scripted(commons(), *["most"] * 3)
    assert [len(table[seat].turns) for seat in table.seats] == [1, 1, 1], "nothing is left to ask for"
    assert outcome.metrics == pytest.approx(
        {"efficiency": 6 / 21, "equality": 1, "sustainability": 1 / 6, "survival": 0, "stock": 1 / 6}
    )
    assert outcome.scores == pytest.approx(dict.fromkeys(table.seats, 2 / 12))


def test_what_is_left_grows_and_scarce_stock_is_shared() -> None:
    outcome, table = play(commons(rounds=3), answer=demands([2, 2, 1], [2, 0, 1], [0, 0, 0]))
    # 6 - 5 = 1 doubles to 2; demands of 3 are met by two thirds; then nothing is left
    assert [seen.user for seen in table["player_2"].shown] == ["Stock: 6", "Stock: 2"]
    taken = {"player_1": 2 + 4 / 3, "player_2": 2, "player_3": 1 + 2 / 3}
    assert outcome.scores == pytest.approx({seat: amount / 6 for seat, amount in taken.items()})
    assert outcome.metrics["stock"] == pytest.approx((6 + 2 + 0) / 18)
    assert outcome.metrics["sustainability"] == pytest.approx((1.5 + 1 + 1.5) / 9)
    a, b, c = sorted(taken.values())
    assert outcome.metrics["equality"] == pytest.approx(1 - 4 * (c - a) / (6 * (a + b + c)))


def test_growth_is_rounded_down_and_capped() -> None:
    scenario = commons(capacity=20, growth=1.15, demands=[0, 1, 8])
    assert scenario.grown(20, 0) == 20
    assert scenario.grown(20, 8) == 13  # 13.8
    assert commons(capacity=50, growth=1.15).grown(20, 0) == 23, "not 22 for want of the last bit"
    assert scenario.grown(5, 9) == 0


def test_a_player_that_never_takes_counts_as_never() -> None:
    outcome, _ = play(commons(rounds=2), answer=demands([0, 0, 1], [0, 0, 1]))
    assert outcome.metrics["sustainability"] == pytest.approx((0 + 0 + 1.5) / 3 / 2)
    idle, _ = scripted(commons(), *["least"] * 3)
    assert (idle.metrics["sustainability"], idle.metrics["efficiency"], idle.metrics["equality"]) == (0, 0, 1)
    assert idle.metrics["survival"] == 1


def test_the_most_there_is_to_take() -> None:
    scenario = commons()
    assert scenario.best_total == 21
    assert scenario.best_single == 12
    lean = commons(players=2, capacity=4, growth=1, demands=[0, 1, 2], rounds=3)
    assert lean.best_total == 4, "nothing grows"


def test_unequal_players_have_demands_of_their_own() -> None:
    scenario = commons(demands=[[0, 1], [0, 1, 2], [0, 1, 2, 3]])
    assert [scenario.question(i, 6, "en").choices[-1] for i in range(3)] == ["1", "2", "3"]
    assert [seat.symmetric_with for seat in scenario.seats(first_task(scenario))] == [None] * 3
    assert (scenario.best_total, scenario.best_single) == (21, 18), "the last alone could take three, six times"
    greedy, _ = play(scenario, answer=demands([1, 2, 3]))
    assert greedy.scores == pytest.approx({"player_1": 1 / 18, "player_2": 2 / 18, "player_3": 3 / 18})
    assert greedy.metrics["equality"] == pytest.approx(1 - 8 / 36)
    ranked, _ = play(scenario, answer=demands(*[[0, 1, 2]] * 6))
    assert (ranked.metrics["efficiency"], ranked.metrics["survival"]) == pytest.approx((18 / 21, 1))
    assert ranked.metrics["equality"] == pytest.approx(1 - 48 / 108)
    shared, table = scripted(scenario, *["share"] * 3)
    assert [turn.text for turn in table["player_3"].turns] == ["1"] * 6
    assert shared.metrics["equality"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 2},
        {"players": 2, "rounds": 3, "capacity": 5, "growth": 1.5},
        {"players": 2, "rounds": 3, "capacity": 5, "growth": 1.5, "demands": [[0, 3], [1, 2, 4]]},
    ],
)
def test_exact_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = commons(**options), drawn_policy(2)
    expected = over_all_plays(scenario, policy)
    found = exact(scenario, probabilities=policy)
    metrics = {name: value for name, value in expected.items() if not name.startswith("score/")}
    assert set(metrics) == {"efficiency", "equality", "sustainability", "survival", "stock"}
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    for seat in scenario.players:
        assert found[f"{seat}_taken"] / scenario.best_single == pytest.approx(expected[f"score/{seat}"])


def test_best_response() -> None:
    scenario = commons()
    modest = {s: [0.0, 1.0, 0.0] for s in scenario.levels()}
    greedy = {s: [0.0, 0.0, 1.0] for s in scenario.levels()}
    # against two that take one each: one each until the end is near, then two of what would be left for nobody
    best = scenario.best_response(0, [modest] * 3)
    assert best > 6
    assert scenario.best_response(0, [greedy] * 3) == pytest.approx(2), "all is gone whatever one does"
    figures = exact(scenario, probabilities=pure(dict.fromkeys(scenario.players, "2")))
    assert figures["nash_conv"] == pytest.approx(0), "the tragedy is an equilibrium"
    figures = exact(scenario, probabilities=pure(dict.fromkeys(scenario.players, "1")))
    assert figures["nash_conv"] == pytest.approx(3 * (best - 6))


def test_levels_are_those_that_can_be_reached() -> None:
    assert commons().levels() == [6, 4, 2]
    assert commons(capacity=5, growth=3).levels() == [5, 3]


def test_every_player_sees_the_same() -> None:
    scenario = commons()
    assert len({scenario.question(i, 4, "en").shown for i in range(3)}) == 1
    shown = scenario.question(0, 4, "zh").shown
    assert (shown.system, shown.user, shown.prefix) == ("从存量中拿0、1、2。剩下的会增长。", "存量：4", "拿：")


def test_what_the_modes_pay_for() -> None:
    kept, _ = scripted(commons(), "share", "share", "share")
    raided, _ = scripted(commons(), "most", "share", "share")
    assert together(kept.scores)["player_1"] > together(raided.scores)["player_1"]
    assert by_rank(kept.scores)["player_1"] < by_rank(raided.scores)["player_1"]


def test_the_script_share_takes_what_grows_back() -> None:
    scenario = commons(capacity=12, demands=[0, 1, 2, 4])
    outcome, table = scripted(scenario, *["share"] * 3)
    assert [turn.text for turn in table["player_1"].turns] == ["2"] * 6
    assert outcome.metrics["survival"] == 1


def test_options_are_checked() -> None:
    for options, problem in [
        ({"demands": [2, 1]}, "rising"),
        ({"demands": [1]}, "rising"),
        ({"demands": [-1, 1]}, "rising"),
        ({"demands": [2, 3]}, "whatever they do"),
        ({"demands": []}, "two or more different whole numbers"),
        ({"demands": [[0, 1], [0, 1]]}, "2 lists for 3 players"),
        ({"demands": [[0, 1], [0, 1], [1]]}, "rising"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            build_scenario("commons", options)


def test_too_much_to_compute_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.scenarios.commons.MAX_STATES", 100)
    with pytest.raises(ScenarioError, match="too many outcomes"):
        exact(commons())
