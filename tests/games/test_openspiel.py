"""OpenSpiel: rules and returns by hand, and NashConv against known values."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.openspiel import OpenSpiel, OpenSpielOptions
from coterie.scenarios.base import ExactlyMeasured, build_scenario
from coterie.scenarios.practice import PracticeTable
from coterie.types import Observation, SeatId, Split
from tests.support.tables import exact, make_task, play, saying


def game(name: str = "kuhn_poker", **options: Any) -> OpenSpiel:
    return OpenSpiel(OpenSpielOptions.model_validate({"game": name, **options}))


def kuhn_card(seen: Observation) -> int:
    """The card a seat of Kuhn poker is told it has; OpenSpiel's information state begins with it."""
    return int(seen.user.splitlines()[1][0])


def kuhn_history(seen: Observation) -> str:
    return seen.user.splitlines()[1][1:]


def kuhn(bets: dict[str, Sequence[float]]) -> Any:
    """A policy of Kuhn poker: after each history, the probability of betting with the low, middle and high card."""

    def policy(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        assert list(choices) == ["Pass", "Bet"]
        bet = bets[kuhn_history(seen)][kuhn_card(seen)]
        return [1 - bet, bet]

    return policy


def test_a_hand_of_kuhn_poker() -> None:
    scenario = game()
    for task in islice(scenario.tasks(Split.TRAIN, 0), 6):
        outcome, table = play(scenario, task, answer=saying({"player_0": "Pass", "player_1": "Pass"}))
        cards = [kuhn_card(table[seat].shown[0]) for seat in table.seats]
        winner, loser = ("player_0", "player_1") if cards[0] > cards[1] else ("player_1", "player_0")
        assert outcome.metrics[f"return_{winner}"] == 1 == -outcome.metrics[f"return_{loser}"]
        assert outcome.scores[winner] == pytest.approx(0.75), "1 of at most 2 chips, between -2 and 2"
        assert outcome.metrics["moves"] == 2
        assert outcome.metrics["finished"] == 1
        outcome, _ = play(scenario, task, answer=saying({"player_0": "Bet", "player_1": "Bet"}))
        assert outcome.scores == {seat: float(seat == winner) for seat in table.seats}
        outcome, _ = play(scenario, task, answer=saying({"player_0": "Bet", "player_1": "Pass"}))
        assert outcome.metrics["return_player_0"] == 1, "player 1 folded"


def test_one_task_deals_the_same_cards_and_other_tasks_others() -> None:
    scenario = game()
    deals = []
    for task in islice(scenario.tasks(Split.TRAIN, 0), 30):
        pair = [play(scenario, task, seed=seed)[1] for seed in (1, 2)]
        first, second = ([kuhn_card(table[seat].shown[0]) for seat in table.seats] for table in pair)
        assert first == second
        deals.append(tuple(first))
    assert len(set(deals)) == 6, "every deal of two out of three cards"


def test_prompt() -> None:
    _, table = play(game(), answer=saying({"player_0": ["Pass", "Bet"], "player_1": "Bet"}))
    seen = table["player_0"].shown[1]
    assert seen.system == "Choose a move."
    assert seen.prefix == "Move:"
    assert seen.user == f"You are player_0.\n{kuhn_card(seen)}pb"
    _, table = play(
        game(system="", prefix="I say"), language="zh", answer=saying({"player_0": "Bet", "player_1": "Bet"})
    )
    seen = table["player_1"].shown[0]
    assert (seen.system, seen.prefix) == ("", "I say")
    assert seen.user.startswith("你是player_1。\n")


def test_words_of_ones_own() -> None:
    scenario = game(actions=["blue", "green"], render="tests.games.test_openspiel:told")
    _, table = play(scenario, answer=saying({"player_0": "green", "player_1": "blue"}))
    assert table["player_1"].shown[0].user.splitlines()[1] == "1: b"


def told(state: Any, player: int) -> str:
    return f"{player}: {state.information_state_string(player)[1:]}"


def test_a_game_that_takes_too_long_ends_with_what_was_earned() -> None:
    outcome, table = play(game("tic_tac_toe", exact=False, max_turns=2))
    assert [len(table[seat].turns) for seat in table.seats] == [2, 2]
    assert outcome.scores == {"player_0": 0.5, "player_1": 0.5}
    assert outcome.metrics["finished"] == 0


def test_forced_moves_are_not_asked_for() -> None:
    outcome, table = play(game("tic_tac_toe", exact=False), answer=lambda seat, seen, choices, rng: choices[0])
    assert all(len(turn.text) > 0 for seat in table.seats for turn in table[seat].turns)
    assert outcome.metrics["finished"] == 1
    assert outcome.scores == {"player_0": 1.0, "player_1": 0.0}, "0 2 4 6 beats 1 3 5"
    assert outcome.metrics["moves"] == 7


# -- exact figures ----------------------------------------------------------------------------------------------------


def test_kuhn_played_evenly() -> None:
    figures = exact(game())
    assert figures["nash_conv"] == pytest.approx(11 / 12)
    assert figures["exploitability"] == pytest.approx(11 / 24)
    assert figures["value_player_0"] == pytest.approx(1 / 8) == -figures["value_player_1"]
    assert figures["gain_player_0"] + figures["gain_player_1"] == pytest.approx(11 / 12)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1 / 3])
def test_kuhn_in_equilibrium(alpha: float) -> None:
    """Kuhn (1950): the first player bets the low card with alpha and the high one with 3 alpha."""
    policy = kuhn(
        {
            "": [alpha, 0, 3 * alpha],
            "p": [1 / 3, 0, 1],
            "b": [0, 1 / 3, 1],
            "pb": [0, alpha + 1 / 3, 1],
        }
    )
    figures = exact(game(), probabilities=policy)
    assert figures["nash_conv"] == pytest.approx(0, abs=1e-9)
    assert figures["value_player_0"] == pytest.approx(-1 / 18)


def test_simultaneous_moves_are_hidden_and_measured() -> None:
    scenario = game("matrix_rps")
    rock = exact(scenario, probabilities=lambda seat, seen, choices: [1, 0, 0])
    assert rock["nash_conv"] == pytest.approx(2), "each gains 1 by paper"
    assert exact(scenario)["nash_conv"] == pytest.approx(0)
    shown = [
        play(scenario, answer=saying({"player_0": said, "player_1": "Rock"}))[1]["player_1"].shown
        for said in ("Rock", "Paper")
    ]
    assert shown[0] == shown[1]
    outcome, _ = play(scenario, answer=saying({"player_0": "Paper", "player_1": "Rock"}))
    assert outcome.scores == {"player_0": 1.0, "player_1": 0.0}


def test_sampled_play_agrees_with_exact() -> None:
    scenario = game()
    bets = {"": [0.9, 0.2, 0.4], "p": [0.1, 0.6, 0.7], "b": [0.3, 0.5, 1.0], "pb": [0.0, 0.8, 0.9]}
    policy = kuhn_clear(bets)

    async def played() -> list[float]:
        tasks = list(islice(scenario.tasks(Split.TRAIN, 3), 1000))
        tables = [PracticeTable(t, scenario.seats(t), seed=n, probabilities=policy) for n, t in enumerate(tasks)]
        outcomes = [await scenario.play(task, table) for task, table in zip(tasks, tables, strict=True)]
        return [outcome.metrics["return_player_0"] for outcome in outcomes]

    returns = asyncio.run(played())
    expected = exact(scenario, probabilities=kuhn(bets))["value_player_0"]
    assert sum(returns) / len(returns) == pytest.approx(expected, abs=0.15)


def kuhn_clear(bets: dict[str, Sequence[float]]) -> Any:
    """Never quite 0, because a practice seat takes the logarithm of what it said."""
    inner = kuhn(bets)
    return lambda seat, seen, choices: [max(p, 1e-12) for p in inner(seat, seen, choices)]


# -- what cannot be played --------------------------------------------------------------------------------------------


def test_a_game_too_large_for_exact_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"more than 20000 nodes.*set exact = false"):
        game("tic_tac_toe")
    with pytest.raises(ConfigError, match="more than 10 nodes"):
        game(exact_nodes=10)
    assert isinstance(game(), ExactlyMeasured)
    assert not isinstance(game("tic_tac_toe", exact=False), ExactlyMeasured)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "kuhn_pokr"}, r"cannot load 'kuhn_pokr'.*registered_names"),
        ({"game": "kuhn_poker(plyers=2)"}, "cannot load"),
        ({"actions": ["a"]}, "must be 2 different words"),
        ({"actions": ["a", "a"]}, "must be 2 different words"),
        ({"game": "mfg_crowd_modelling"}, "mean-field"),
        ({"render": "nowhere:told"}, "cannot import 'nowhere'"),
        ({"exactt": True}, "did you mean 'exact'"),
        ({"view": "both"}, "view"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("openspiel", options)


def test_a_task_of_another_game_is_refused() -> None:
    with pytest.raises(ScenarioError, match="content must be"):
        game().check_task(make_task(content={"game": "chess", "game_seed": 1}))
