"""Signalling for teams and Taboo: points by hand, exact figures against all plays."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.relay import HELDOUT_TASKS, Relay
from coterie.scenarios.taboo import WORDS, Taboo, TabooOptions
from coterie.scenarios.team_signaling import TeamSignaling, TeamSignalingOptions
from coterie.types import Split, TrainingTask
from tests.support.plays import drawn_policy, over_all_plays
from tests.support.tables import exact, make_task, play, saying


def signaling(**options: Any) -> TeamSignaling:
    return TeamSignaling(TeamSignalingOptions.model_validate(options))


def taboo(**options: Any) -> Taboo:
    return Taboo(TabooOptions.model_validate(options))


def game(scenario: Relay, *targets: int) -> TrainingTask:
    return make_task(content={"targets": list(targets)}, max_steps=scenario.steps, required_models=4)


def every_game(scenario: Relay) -> list[TrainingTask]:
    return [game(scenario, *targets) for targets in product(range(scenario.targets), repeat=scenario.relay.rounds)]


# -- signalling -------------------------------------------------------------------------------------------------------


def test_each_team_hears_its_own_speaker() -> None:
    scenario = signaling(rounds=2)
    said = {
        "red_speaker": ["red", "blue"],
        "red_listener": ["chair", "clock"],
        "blue_speaker": ["pink", "pink"],
        "blue_listener": ["clock", "clock"],
    }
    outcome, table = play(scenario, game(scenario, 0, 1), answer=saying(said))
    assert [seen.user for seen in table["red_listener"].shown] == ["Signal: red", "Signal: blue"]
    assert [seen.user for seen in table["blue_listener"].shown] == ["Signal: pink"] * 2
    assert [seen.user for seen in table["blue_speaker"].shown] == ["Object: chair", "Object: clock"]
    assert outcome.scores == {"red_speaker": 1, "red_listener": 1, "blue_speaker": 0.5, "blue_listener": 0.5}
    assert outcome.metrics == {
        "red_success": 1, "blue_success": 0.5, "success": 0.75, "red_wins": 1, "blue_wins": 0, "draws": 0,
    }  # fmt: skip


def test_an_intercepted_point_does_not_count() -> None:
    scenario = signaling(rounds=1, intercept=True)
    said = {
        "red_speaker": "red",
        "red_listener": ["chair", "chair"],  # own symbol, then the rival's
        "blue_speaker": "blue",
        "blue_listener": ["chair", "clock"],
    }
    outcome, table = play(scenario, game(scenario, 0), answer=saying(said))
    assert [seen.user for seen in table["red_listener"].shown] == ["Signal: red", "Signal: blue"]
    assert [seen.system for seen in table["red_listener"].shown] == ["Name the object.", "Name the rival's object."]
    assert outcome.scores["red_speaker"] == 1
    assert outcome.scores["blue_speaker"] == 0
    assert outcome.accuracy["blue_listener"] == 1, "it was right all the same"
    assert outcome.metrics["blue_intercepted"] == 1
    assert outcome.metrics["red_intercepted"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"symbols": 2, "states": 2, "rounds": 2},
        {"symbols": 2, "states": 3, "rounds": 1},
        {"symbols": 2, "states": 2, "rounds": 1, "intercept": True},
    ],
)
def test_exact_signalling_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = signaling(**options), drawn_policy(3, sharp=2)
    expected = over_all_plays(scenario, policy, every_game(scenario))
    found = exact(scenario, probabilities=policy)
    metrics = {name: value for name, value in expected.items() if not name.startswith("score/")}
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    assert found["red_wins"] != pytest.approx(found["blue_wins"])


def test_a_code_beats_chance() -> None:
    """Red has a code, blue draws its answers: it wins unless blue is right by luck in all three rounds."""
    scenario = signaling()

    def policy(seat: str, seen: Any, choices: Any) -> list[float]:
        if seat.startswith("blue"):
            return [1 / len(choices)] * len(choices)
        other = ("red", "blue", "green", "pink") if seat == "red_listener" else ("chair", "clock", "piano", "train")
        return [float(seen.user.endswith(" " + word)) for word in other]

    found = exact(scenario, probabilities=policy)
    assert found["red_success"] == 1
    assert found["blue_success"] == pytest.approx(1 / 4)
    assert found["red_wins"] == pytest.approx(1 - (1 / 4) ** 3)
    assert found["draws"] == pytest.approx((1 / 4) ** 3)
    assert (found["red_bits"], found["blue_bits"]) == pytest.approx((2, 0))


def test_tasks() -> None:
    scenario = signaling(rounds=4)
    heldout = list(scenario.tasks(Split.HELDOUT, 1))
    assert len(heldout) == HELDOUT_TASKS
    assert {len(task.content["targets"]) for task in heldout} == {4}
    drawn = [target for task in heldout for target in task.content["targets"]]
    assert set(drawn) == {0, 1, 2, 3}
    assert scenario.targets_of(make_task()) == scenario.targets_of(make_task()), "a user's task without content"
    for wrong in (None, [0, 1], [0, 1, 2, 4], [0, 1, 2, True], "0123"):
        with pytest.raises(ScenarioError, match="a list of 4"):
            scenario.check_task(make_task(content={"targets": wrong}))


# -- taboo ------------------------------------------------------------------------------------------------------------


def test_a_taboo_clue_costs_the_round() -> None:
    scenario = taboo(rounds=1)
    said = {"red_giver": "sand", "red_guesser": "beach", "blue_giver": "sea", "blue_guesser": "beach"}
    outcome, table = play(scenario, game(scenario, 0), answer=saying(said))
    assert table["red_giver"].shown[0].user == "Not: sand\nWord: beach"
    assert table["blue_guesser"].shown[0].user == "Clue: sea"
    assert outcome.scores == {"red_giver": 0, "red_guesser": 0, "blue_giver": 1, "blue_guesser": 1}
    assert outcome.accuracy["red_guesser"] == 1
    assert outcome.metrics["taboo"] == outcome.metrics["fitting"] == 0.5
    assert outcome.metrics["blue_wins"] == 1


def test_another_targets_taboo_clue_is_free() -> None:
    scenario = taboo(rounds=1, teams=1)
    outcome, _ = play(scenario, game(scenario, 1), answer=saying({"red_giver": "sand", "red_guesser": "hospital"}))
    assert outcome.scores == {"red_giver": 1, "red_guesser": 1}
    assert outcome.metrics["taboo"] == 0
    assert "red_wins" not in outcome.metrics, "one team has nobody to beat"


@pytest.mark.parametrize("target", range(6))
def test_excluded_clues_cannot_be_said(target: int) -> None:
    scenario = taboo(taboo="excluded")
    question = scenario.says("red", target, "en")
    name = tuple(WORDS["en"])[target]
    assert WORDS["en"][name][0] not in question.choices
    assert len(question.choices) == 11
    words = [scenario.said(target, choice) for choice in range(11)]
    assert not any(scenario.spoils(target, word) for word in words)
    assert [scenario._clues("en")[word] for word in words] == list(question.choices)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": 2, "rounds": 1},
        {"targets": 2, "rounds": 1, "taboo": "excluded"},
        {"targets": 3, "rounds": 2, "teams": 1, "taboo": "excluded"},
    ],
)
def test_exact_taboo_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = taboo(**options), drawn_policy(9, sharp=2)
    expected = over_all_plays(scenario, policy, every_game(scenario))
    found = exact(scenario, probabilities=policy)
    metrics = {name: value for name, value in expected.items() if not name.startswith("score/")}
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_careful_script_is_always_right(language: str) -> None:
    scenario = taboo(rounds=6)
    careful = scenario.scripts["careful"]
    answer = lambda seat, seen, choices, rng: careful(seen, choices, rng)  # noqa: E731
    outcome, _ = play(scenario, game(scenario, *range(6)), answer=answer, language=language)
    assert outcome.metrics["success"] == outcome.metrics["fitting"] == outcome.metrics["draws"] == 1
    assert outcome.metrics["taboo"] == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_are_told_apart(language: str) -> None:
    every = [word for target, clues in WORDS[language].items() for word in (target, *clues)]
    assert len(set(every)) == len(every) == 18


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="teams"):
        build_scenario("taboo", {"teams": 3})
    with pytest.raises(ConfigError, match="intercepts"):
        build_scenario("team_signaling", {"intercepts": True})
