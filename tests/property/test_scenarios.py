"""Laws of the scenarios that hold for any policies and any payoffs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.scenarios.bimatrix import GAMES, Bimatrix, best_response, nash_conv, occupancy
from coterie.scenarios.matrix import Matrix, MatrixOptions
from coterie.scenarios.signaling import SYMBOLS, TARGETS, Signaling, SignalingOptions, mutual_information_bits
from coterie.scenarios.teamwork import team_scores
from coterie.types import Observation, SeatId
from tests.support.tables import exact, make_table, make_task, play

FEW = settings(max_examples=40)
payoff = st.integers(-5, 5)


def distributions(size: int) -> st.SearchStrategy[list[float]]:
    weights = st.lists(st.floats(0.001, 1), min_size=size, max_size=size)
    return weights.map(lambda drawn: [w / sum(drawn) for w in drawn])


@st.composite
def games(draw: st.DrawFn, symmetric: bool = False) -> Bimatrix:
    rows = draw(st.integers(2, 3))
    columns = rows if symmetric else draw(st.integers(2, 3))
    own = [[draw(payoff) for _ in range(columns)] for _ in range(rows)]
    other = [[own[j][i] if symmetric else draw(payoff) for j in range(columns)] for i in range(rows)]
    table = tuple(tuple((float(own[i][j]), float(other[i][j])) for j in range(columns)) for i in range(rows))
    return Bimatrix("drawn", ("a", "b", "c")[: max(rows, columns)], table)


@FEW
@given(st.data())
def test_nash_conv_is_never_negative_and_no_action_beats_the_best_response(data: st.DataObject) -> None:
    game = data.draw(games())
    rows, columns = game.shape
    row, column = {(): data.draw(distributions(rows))}, {(): data.draw(distributions(columns))}
    assert nash_conv(game, row, column, 1, 0) >= 0
    best = best_response(game, column, 0, 1, 0)
    for i in range(rows):
        pure = {(): [float(i == k) for k in range(rows)]}
        assert game.expected(occupancy(game, pure, column, 1, 0))[0] <= best + 1e-9


@FEW
@given(st.data())
def test_swapping_the_players_of_a_symmetric_game_swaps_their_scores(data: st.DataObject) -> None:
    drawn = data.draw(games(symmetric=True))
    values = {value for row in drawn.payoffs for pair in row for value in pair}
    if len(values) == 1:
        return  # refused by the options: nothing to play for
    scenario = Matrix(MatrixOptions.model_validate({"payoffs": drawn.payoffs, "rounds": 3}))
    assert scenario.game.symmetric
    moves = data.draw(st.lists(st.tuples(*[st.integers(0, drawn.shape[0] - 1)] * 2), min_size=3, max_size=3))

    def scores(order: tuple[int, int]) -> Any:
        turns = {seat: iter([pair[k] for pair in moves]) for seat, k in zip(("row", "column"), order, strict=True)}
        return play(scenario, answer=lambda seat, seen, choices, rng: choices[next(turns[seat])])[0].scores

    one, two = scores((0, 1)), scores((1, 0))
    assert one["row"] == pytest.approx(two["column"])
    assert one["column"] == pytest.approx(two["row"])
    assert all(0 <= score <= 1 for score in one.values())


@FEW
@given(distributions(2), distributions(2))
def test_matching_pennies_gains_nothing_in_sum(row: list[float], column: list[float]) -> None:
    scenario = Matrix(MatrixOptions(game="matching_pennies"))
    figures = exact(scenario, probabilities=lambda seat, seen, choices: row if seat == "row" else column)
    assert figures["row_payoff"] + figures["column_payoff"] == pytest.approx(0, abs=1e-12)
    # in 2x2 zero-sum games NashConv is the distance from half and half, summed over both seats
    assert figures["nash_conv"] == pytest.approx(abs(2 * row[0] - 1) + abs(2 * column[0] - 1), abs=1e-9)


@FEW
@given(st.sampled_from(sorted(GAMES)), st.integers(1, 5), st.integers(0, 2), st.integers(0, 10**6))
def test_shares_of_the_rounds_sum_to_one(name: str, rounds: int, memory: int, seed: int) -> None:
    scenario = Matrix(MatrixOptions.model_validate({"game": name, "rounds": rounds, "memory": memory}))
    for figures in (play(scenario, seed=seed)[0].metrics, exact(scenario)):
        for seat in ("row", "column"):
            total = sum(figures[f"{seat}_{action}"] for action in scenario.game.actions)
            assert total == pytest.approx(1)


@FEW
@given(st.data(), st.integers(2, 4), st.integers(2, 4))
def test_a_code_cannot_succeed_more_often_than_its_symbols_allow(
    data: st.DataObject, symbols: int, states: int
) -> None:
    sender = [data.draw(distributions(symbols)) for _ in range(states)]
    receiver = [data.draw(distributions(states)) for _ in range(symbols)]

    def policy(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        word = seen.user.split()[-1]
        return sender[TARGETS["en"].index(word)] if seat == "sender" else receiver[SYMBOLS["en"].index(word)]

    figures = exact(Signaling(SignalingOptions(symbols=symbols, states=states)), probabilities=policy)
    assert 0 <= figures["success"] <= min(1, symbols / states) + 1e-9
    assert 0 <= mutual_information_bits(sender) <= math.log2(min(symbols, states)) + 1e-9
    # with one receiver the two ways of counting success are the same
    assert figures["all_correct"] == pytest.approx(figures["success"])


@FEW
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), min_size=3, max_size=3),
    st.permutations("abc"),
    st.sampled_from([0.5, 0.9]),
)
def test_permuting_seats_permutes_team_scores(
    drawn: list[tuple[float, int]], order: Sequence[str], level: float
) -> None:
    table = make_table(make_task(cooperation_level=level), "abc")
    here = dict(zip("abc", drawn, strict=True))
    there = dict(zip(order, drawn, strict=True))
    one, two = (
        team_scores(table, {s: a for s, (a, _) in who.items()}, {s: t for s, (_, t) in who.items()}, 10)
        for who in (here, there)
    )
    for seat, moved in zip("abc", order, strict=True):
        assert one[seat] == pytest.approx(two[moved])
        assert 0.5 * here[seat][0] <= one[seat] <= here[seat][0]
