"""Laws of games in turns that hold for any policies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.scenarios.poker import Kuhn, Leduc, PokerOptions
from coterie.scenarios.poker_rules import KUHN, LEDUC
from coterie.scenarios.sequential import GameTree, best_response, expected_returns, game_tree, nash_conv
from coterie.scenarios.tictactoe import TicTacToe, TicTacToeOptions
from coterie.types import Observation, SeatId
from tests.support.tables import exact, play

FEW = settings(max_examples=25, deadline=None)
TREES = {"kuhn": game_tree(KUHN), "leduc": game_tree(LEDUC)}


@st.composite
def policies(draw: st.DrawFn, tree: GameTree) -> list[dict[Any, list[float]]]:
    """A policy for each player: mostly at random, sure here and there."""
    # numbers drawn one by one are more than hypothesis lets an example have: it would drop every one of Leduc's
    rng = random.Random(draw(st.integers(0, 2**32)))
    sharpness = draw(st.sampled_from([0, 1, 5, 50]))
    drawn: list[dict[Any, list[float]]] = [{} for _ in range(tree.players)]
    for here in tree.information_states:
        weights = [rng.random() ** sharpness + 1e-12 for _ in here.actions]
        drawn[here.player][here.information] = [w / sum(weights) for w in weights]
    return drawn


@FEW
@given(st.sampled_from(sorted(TREES)), st.data())
def test_no_policy_beats_the_best_response(name: str, data: st.DataObject) -> None:
    tree = TREES[name]
    ours, others = data.draw(policies(tree)), data.draw(policies(tree))
    values = expected_returns(tree, ours)
    assert sum(values) == pytest.approx(0, abs=1e-9)
    assert nash_conv(tree, ours) >= 0
    for player in range(2):
        most, best = best_response(tree, ours, player)
        tried = [others[p] if p == player else ours[p] for p in range(2)]
        assert expected_returns(tree, tried)[player] <= most + 1e-9
        pure = {
            here.information: [float(a == best[here.information]) for a in range(len(here.actions))]
            for here in tree.of(player)
        }
        followed = [pure if p == player else ours[p] for p in range(2)]
        assert expected_returns(tree, followed)[player] == pytest.approx(most, abs=1e-9)


@FEW
@given(st.sampled_from([Kuhn, Leduc]), st.integers(0, 10**6))
def test_what_one_seat_wins_the_other_loses(game: Any, seed: int) -> None:
    outcome, _ = play(game(PokerOptions()), seed=seed)
    assert sum(outcome.scores.values()) == pytest.approx(1)


@FEW
@given(st.sampled_from([Kuhn, Leduc]), st.data())
def test_exploitabilities_are_not_negative_and_sum_to_nash_conv(game: Any, data: st.DataObject) -> None:
    scenario = game(PokerOptions())
    drawn = data.draw(policies(scenario.tree))

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> Sequence[float]:
        player, view = scenario.seen(seen)
        return drawn[player][view]

    figures = exact(scenario, probabilities=probabilities)
    assert figures["nash_conv"] == pytest.approx(nash_conv(scenario.tree, drawn), abs=1e-9)
    both = [figures["exploitability_first"], figures["exploitability_second"]]
    assert min(both) >= -1e-6  # Leduc's value is known to seven digits
    assert sum(both) == pytest.approx(figures["nash_conv"], abs=1e-9)


@FEW
@given(st.floats(0, 0.2), st.integers(0, 10**6))
def test_results_of_tic_tac_toe_sum_to_one(floor: float, seed: int) -> None:
    scenario = TicTacToe(TicTacToeOptions(exact_floor=floor))

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> Sequence[float]:
        first = 0.5 + 0.5 * ((seed + len(seen.prefix)) % 2)
        return [first, *[(1 - first) / max(1, len(choices) - 1)] * (len(choices) - 1)] if len(choices) > 1 else [1.0]

    figures = exact(scenario, probabilities=probabilities)
    for opponent in ("minimax", "random"):
        total = sum(figures[f"{opponent}_{end}"] for end in ("win", "draw", "loss"))
        assert total <= 1 + 1e-9
        assert total >= 1 - figures["unresolved"] - 1e-9
