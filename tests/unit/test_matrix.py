"""Matrix games: payoffs, prompts, scripts, and exact figures against brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.bimatrix import GAMES, Bimatrix, History, best_response, nash_conv, occupancy, remembered
from coterie.scenarios.matrix import Matrix, MatrixOptions
from coterie.types import Observation, SeatId, Split
from tests.support.tables import exact, first_task, play

C, D = "blue", "green"
NAMES = sorted(GAMES)


def game(name: str = "prisoners_dilemma", **options: Any) -> Matrix:
    return Matrix(MatrixOptions.model_validate({"game": name, **options}))


def moves(row: Sequence[str], column: Sequence[str], scenario: Matrix, **options: Any) -> Any:
    turns = {"row": iter(row), "column": iter(column)}
    return play(scenario, answer=lambda seat, seen, choices, rng: next(turns[seat]), **options)


def scripted(scenario: Matrix, row: str, column: str, **options: Any) -> Any:
    players = {"row": scenario.scripts[row], "column": scenario.scripts[column]}
    return play(scenario, answer=lambda seat, seen, choices, rng: players[seat](seen, choices, rng), **options)


@pytest.mark.parametrize(
    ("row", "column", "scores", "joint", "cooperation"),
    [(C, C, (0.6, 0.6), 6, 1.0), (C, D, (0.0, 1.0), 5, 0.5), (D, C, (1.0, 0.0), 5, 0.5), (D, D, (0.2, 0.2), 2, 0.0)],
)
def test_prisoners_dilemma(row: str, column: str, scores: Any, joint: float, cooperation: float) -> None:
    outcome, _ = moves([row], [column], game())
    assert (outcome.scores["row"], outcome.scores["column"]) == pytest.approx(scores)
    assert outcome.metrics["joint_payoff"] == joint
    assert outcome.metrics["efficiency"] == pytest.approx(joint / 6)
    assert outcome.metrics["cooperation"] == cooperation
    assert outcome.metrics["row_cooperate"] == float(row == C) == 1 - outcome.metrics["row_defect"]
    assert outcome.metrics["column_cooperate"] == float(column == C)


def test_the_dilemma_is_one_and_the_stag_hunt_is_one() -> None:
    (reward, sucker), (temptation, punishment) = [
        [GAMES["prisoners_dilemma"].payoffs[i][j][0] for j in (0, 1)] for i in (0, 1)
    ]
    assert temptation > reward > punishment > sucker
    assert 2 * reward > temptation + sucker, "taking turns must not beat cooperating"
    (both, alone), (safe, hare) = [[GAMES["stag_hunt"].payoffs[i][j][0] for j in (0, 1)] for i in (0, 1)]
    assert both > safe >= hare > alone
    assert (hare - alone) ** 2 > (both - safe) ** 2, "(hare, hare) is risk dominant"


def test_matching_pennies_is_zero_sum_and_has_no_efficiency() -> None:
    for row, column in product((C, D), repeat=2):
        outcome, _ = moves([row], [column], game("matching_pennies"))
        assert outcome.scores["row"] == float(row == column)
        assert outcome.scores["row"] + outcome.scores["column"] == 1
        assert outcome.metrics["joint_payoff"] == 0
        assert "efficiency" not in outcome.metrics
        assert "cooperation" not in outcome.metrics


def test_each_action_of_rock_paper_scissors_beats_one_and_loses_to_one() -> None:
    rps = GAMES["rock_paper_scissors"]
    paper_wraps_rock, scissors_cut_paper, rock_blunts_scissors = (1, 0), (2, 1), (0, 2)
    wins = {pair for pair in rps.joint_actions if rps.payoffs[pair[0]][pair[1]] == (1, -1)}
    assert wins == {paper_wraps_rock, scissors_cut_paper, rock_blunts_scissors}
    assert all(rps.payoffs[i][i] == (0, 0) and sum(rps.payoffs[i][j]) == 0 for i, j in rps.joint_actions)
    third = {(): (1 / 3, 1 / 3, 1 / 3)}
    assert nash_conv(rps, third, third, 1, 0) == pytest.approx(0.0, abs=1e-12)
    # too few papers: rock gains 0.2 on either side
    rocky = {(): (0.4, 0.2, 0.4)}
    assert nash_conv(rps, rocky, rocky, 1, 0) == pytest.approx(0.4)
    outcome, _ = moves(["green"], ["blue"], game("rock_paper_scissors"))
    assert outcome.scores == {"row": 1.0, "column": 0.0}


def test_repeated_play_averages_and_remembers() -> None:
    scenario = game(rounds=4, memory=2)
    outcome, table = moves([C, C, D, D], [C, D, D, C], scenario)
    assert outcome.scores["row"] == pytest.approx((3 + 0 + 1 + 5) / 4 / 5)
    assert outcome.scores["column"] == pytest.approx((3 + 5 + 1 + 0) / 4 / 5)
    assert outcome.metrics["cooperation"] == 0.5
    assert outcome.metrics["joint_payoff"] == (6 + 5 + 2 + 5) / 4
    shown = [seen.user.splitlines()[5:] for seen in table["row"].shown]
    assert shown == [
        [],
        ["Rounds before (you, other): blue blue"],
        ["Rounds before (you, other): blue blue, blue green"],
        ["Rounds before (you, other): blue green, green green"],
    ]
    assert table["column"].shown[2].user.endswith("(you, other): blue blue, green blue")


def test_without_memory_every_round_looks_the_same() -> None:
    _, table = play(game(rounds=6, memory=0))
    assert len(set(table["row"].shown)) == 1


def test_prompt_gives_the_points_and_no_advice() -> None:
    scenario = game()
    seen = scenario.shown("row", (), "en")
    assert seen.user == ("Points (you, other):\nblue blue 3 3\nblue green 0 5\ngreen blue 5 0\ngreen green 1 1")
    assert scenario.shown("column", (), "en") == seen, "a symmetric game looks the same from both seats"
    assert scenario.choices("row", "en") == ("blue", "green")
    text = (seen.system + seen.user + seen.prefix).lower()
    assert not any(word in text for word in ("cooperat", "defect", "dilemma", "prison", "win", "best", "together"))
    chinese = scenario.shown("row", ((0, 1),), "zh")
    assert chinese.system == "选一个词。"
    assert chinese.user.splitlines()[-1] == "前几轮（你、对方）：青 红"


def test_each_seat_sees_its_own_points_first() -> None:
    payoffs = [[[0, 1], [2, -3], [4, 4]], [[1, 1], [0.5, 0], [-1, 2]]]
    scenario = Matrix(MatrixOptions.model_validate({"payoffs": payoffs, "labels": ["up", "mid", "low"]}))
    assert scenario.shown("row", (), "en").user.splitlines()[1:] == [
        "up up 0 1", "up mid 2 -3", "up low 4 4", "mid up 1 1", "mid mid 0.5 0", "mid low -1 2",
    ]  # fmt: skip
    assert scenario.shown("column", (), "en").user.splitlines()[1:] == [
        "up up 1 0", "up mid 1 1", "mid up -3 2", "mid mid 0 0.5", "low up 4 4", "low mid 2 -1",
    ]  # fmt: skip
    assert scenario.choices("row", "en") == ("up", "mid")
    assert scenario.choices("column", "en") == ("up", "mid", "low")
    outcome, _ = moves(["mid"], ["low"], scenario)
    assert outcome.scores == pytest.approx({"row": 2 / 7, "column": 5 / 7})
    assert outcome.metrics["row_a2"] == outcome.metrics["column_a3"] == 1
    assert "tit_for_tat" not in scenario.scripts


def test_seats_are_marked_alike_in_symmetric_games_only() -> None:
    alike = {name: game(name).seats(first_task(game(name)))[1].symmetric_with for name in NAMES}
    assert alike == {
        "prisoners_dilemma": "row", "stag_hunt": "row", "coordination": "row", "rock_paper_scissors": "row",
        "matching_pennies": None,
    }  # fmt: skip


def test_tasks() -> None:
    scenario = game(rounds=3, cooperation_level=0.75, reward_pool=2.0)
    (heldout,) = scenario.tasks(Split.HELDOUT, 0)
    assert (heldout.max_steps, heldout.required_models) == (3, 2)
    assert (heldout.cooperation_level, heldout.reward_pool) == (0.75, 2.0)
    assert scenario.single_task


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tit_for_tat(language: str) -> None:
    scenario = game(rounds=5)
    outcome, _ = scripted(scenario, "tit_for_tat", "always_defect", language=language)
    assert outcome.metrics["row_cooperate"] == pytest.approx(1 / 5)
    outcome, _ = scripted(scenario, "tit_for_tat", "tit_for_tat", language=language)
    assert outcome.metrics["cooperation"] == 1
    outcome, _ = scripted(scenario, "always_cooperate", "tit_for_tat", language=language)
    assert outcome.metrics["cooperation"] == 1
    words = {"en": (C, D), "zh": ("青", "红")}[language]
    column = iter([words[0], words[1], words[0], words[0], words[1]])
    copy = scenario.scripts["tit_for_tat"]
    _, table = play(
        scenario,
        language=language,
        answer=lambda seat, seen, choices, rng: next(column) if seat == "column" else copy(seen, choices, rng),
    )
    assert [turn.choice for turn in table["row"].turns] == [0, 0, 1, 0, 0]


def test_random_script_depends_on_the_seed_alone() -> None:
    scenario = game(rounds=20)
    runs = [scripted(scenario, "random", "random", seed=seed)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_scripts_that_need_what_is_not_shown_are_not_offered() -> None:
    assert "tit_for_tat" not in game(rounds=2, memory=0).scripts
    assert set(game("stag_hunt").scripts) == {"always_stag", "always_hare", "random", "tit_for_tat"}


def history_policies(scenario: Matrix, seed: int) -> Any:
    """Random policies over prompts, and the same by history."""
    rng = random.Random(seed)
    rounds, memory = scenario.options.rounds, scenario.options.memory
    by_history: dict[SeatId, dict[History, list[float]]] = {"row": {}, "column": {}}
    by_prompt: dict[tuple[SeatId, Observation], list[float]] = {}
    for length in range(min(memory, rounds - 1) + 1):
        for history in product(scenario.game.joint_actions, repeat=length):
            for player, seat in enumerate(("row", "column")):
                weights = [rng.random() ** 2 for _ in range(scenario.game.shape[player])]
                probabilities = [w / sum(weights) for w in weights]
                by_history[seat][history] = probabilities
                by_prompt[seat, scenario.shown(seat, history, "en")] = probabilities
    return by_history, lambda seat, seen, choices: by_prompt[seat, seen]


def test_exact_one_shot_against_hand_computation() -> None:
    p, q = 0.3, 0.9  # of cooperating

    def policy(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        return [p, 1 - p] if seat == "row" else [q, 1 - q]

    figures = exact(game(), probabilities=policy)
    row = 3 * p * q + 5 * (1 - p) * q + (1 - p) * (1 - q)
    column = 3 * p * q + 5 * p * (1 - q) + (1 - p) * (1 - q)
    assert figures["row_payoff"] == pytest.approx(row)
    assert figures["column_payoff"] == pytest.approx(column)
    assert figures["cooperation"] == pytest.approx(0.6)
    assert figures["joint_payoff"] == pytest.approx(row + column)
    assert figures["efficiency"] == pytest.approx((row + column) / 6)
    best = (5 * q + (1 - q)) + (5 * p + (1 - p))  # defecting dominates
    assert figures["nash_conv"] == pytest.approx(best - row - column)


@pytest.mark.parametrize(
    ("name", "row", "column", "expected"),
    [
        ("prisoners_dilemma", [0, 1], [0, 1], 0.0),
        ("prisoners_dilemma", [1, 0], [1, 0], 4.0),
        ("stag_hunt", [1, 0], [1, 0], 0.0),
        ("stag_hunt", [0, 1], [0, 1], 0.0),
        ("stag_hunt", [0.75, 0.25], [0.75, 0.25], 0.0),
        ("stag_hunt", [1, 0], [0, 1], 4.0),
        ("matching_pennies", [0.5, 0.5], [0.5, 0.5], 0.0),
        ("matching_pennies", [1, 0], [0.5, 0.5], 1.0),
        ("matching_pennies", [1, 0], [1, 0], 2.0),
        ("coordination", [0.5, 0.5], [0.5, 0.5], 0.0),
        ("coordination", [1, 0], [0, 1], 2.0),
    ],
)
def test_nash_conv_of_known_profiles(name: str, row: Any, column: Any, expected: float) -> None:
    figures = exact(game(name), probabilities=lambda seat, seen, choices: row if seat == "row" else column)
    assert figures["nash_conv"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("rounds", "memory"), [(1, 3), (2, 0), (3, 1), (3, 2), (4, 1)])
def test_exact_repeated_equals_the_sum_over_all_plays(rounds: int, memory: int) -> None:
    scenario = game("stag_hunt", rounds=rounds, memory=memory)
    by_history, policy = history_policies(scenario, seed=rounds)
    row = column = cooperation = 0.0
    for plays in product(scenario.game.joint_actions, repeat=rounds):
        p = 1.0
        for t, (i, j) in enumerate(plays):
            seen = plays[max(0, t - memory) : t]
            p *= by_history["row"][seen][i] * by_history["column"][seen][j]
        payoffs = [scenario.game.payoffs[i][j] for i, j in plays]
        row += p * sum(pair[0] for pair in payoffs) / rounds
        column += p * sum(pair[1] for pair in payoffs) / rounds
        cooperation += p * sum((i == 0) + (j == 0) for i, j in plays) / 2 / rounds
    figures = exact(scenario, probabilities=policy)
    assert figures["row_payoff"] == pytest.approx(row, abs=1e-12)
    assert figures["column_payoff"] == pytest.approx(column, abs=1e-12)
    assert figures["cooperation"] == pytest.approx(cooperation, abs=1e-12)


def best_by_enumeration(game: Bimatrix, opponent: Any, player: int, rounds: int, memory: int) -> float:
    """The best deterministic strategy that remembers everything, found by trying all."""
    situations = [h for length in range(rounds) for h in product(game.joint_actions, repeat=length)]
    best = float("-inf")
    for picks in product(range(game.shape[player]), repeat=len(situations)):
        strategy = dict(zip(situations, picks, strict=True))
        value = 0.0
        for theirs in product(range(game.shape[1 - player]), repeat=rounds):
            p, payoff, played = 1.0, 0.0, ()
            for action in theirs:
                p *= opponent[remembered(played, memory)][action]
                pair = (strategy[played], action) if player == 0 else (action, strategy[played])
                payoff += game.payoffs[pair[0]][pair[1]][player]
                played = (*played, pair)
            value += p * payoff
        best = max(best, value / rounds)
    return best


@pytest.mark.parametrize("memory", [0, 1])
@pytest.mark.parametrize("name", ["prisoners_dilemma", "matching_pennies"])
def test_best_response_equals_the_best_of_all_strategies(name: str, memory: int) -> None:
    scenario = game(name, rounds=2, memory=memory)
    by_history, policy = history_policies(scenario, seed=11)
    args = (2, memory)
    row = best_by_enumeration(scenario.game, by_history["column"], 0, *args)
    column = best_by_enumeration(scenario.game, by_history["row"], 1, *args)
    assert best_response(scenario.game, by_history["column"], 0, *args) == pytest.approx(row, abs=1e-12)
    assert best_response(scenario.game, by_history["row"], 1, *args) == pytest.approx(column, abs=1e-12)
    figures = exact(scenario, probabilities=policy)
    gained = row - figures["row_payoff"] + column - figures["column_payoff"]
    assert figures["nash_conv"] == pytest.approx(gained, abs=1e-12)


def test_grim_opponent_is_best_answered_by_cooperating_to_the_last_round_but_one() -> None:
    dilemma = GAMES["prisoners_dilemma"]
    rounds, memory = 4, 3
    grim = {
        history: [1.0, 0.0] if all(pair[0] == 0 for pair in history) else [0.0, 1.0]
        for length in range(4)
        for history in product(dilemma.joint_actions, repeat=length)
    }
    assert best_response(dilemma, grim, 0, rounds, memory) == pytest.approx((3 + 3 + 3 + 5) / 4)
    assert sum(occupancy(dilemma, grim, grim, rounds, memory).values()) == pytest.approx(1)
    assert nash_conv(dilemma, grim, grim, rounds, memory) > 0


def test_exact_refuses_what_it_cannot_enumerate() -> None:
    with pytest.raises(ScenarioError, match=r"5461 histories.*lower memory or rounds"):
        exact(game(rounds=20, memory=6))
    assert exact(game(rounds=20, memory=1))["cooperation"] == pytest.approx(0.5)


def test_sampled_play_agrees_with_exact() -> None:
    scenario = game(rounds=3, memory=1)
    _, policy = history_policies(scenario, seed=2)
    played = [play(scenario, seed=seed, probabilities=policy)[0].metrics["cooperation"] for seed in range(1500)]
    assert sum(played) / 1500 == pytest.approx(exact(scenario, probabilities=policy)["cooperation"], abs=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "chicken"}, "game"),
        ({"game": "stag_hunt", "payoffs": [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]}, "either game or payoffs"),
        ({"actions": ["a", "b"]}, "names the actions of your own payoffs"),
        ({"payoffs": [[[1, 0], [0, 1]]]}, "1 rows and 2 columns"),
        ({"payoffs": []}, "0 rows and 0 columns"),
        ({"payoffs": [[[1, 0], [0, 1]], [[1, 0]]]}, r"payoffs\[1\] has 1 entries"),
        ({"payoffs": [[[1, 1], [1, 1]], [[1, 1], [1, 1]]]}, "nothing to play for"),
        ({"payoffs": [[[1, float("nan")], [1, 1]], [[1, 1], [1, 1]]]}, "finite"),
        ({"payoffs": [[[1, 0], [0, 1]], [[0, 1], [1, 0]]], "actions": ["a"]}, "1 names, the game has 2"),
        ({"payoffs": [[[1, 0], [0, 1]], [[0, 1], [1, 0]]], "actions": ["a", "a"]}, "different single words"),
        ({"labels": ["x"]}, "labels has 1 words"),
        ({"labels": ["x", "x"]}, "differ"),
        ({"labels": ["x", "y z"]}, "'y z' must be one word"),
        ({"payoffs": [[[i, j] for j in range(9)] for i in range(9)]}, "9 actions need labels"),
        ({"rounds": 21}, "rounds"),
        ({"memory": -1}, "memory"),
        ({"round": 2}, "did you mean 'rounds'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("matrix", options)
