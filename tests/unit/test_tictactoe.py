"""Tic-tac-toe: rules, perfect play, what is shown, and exact results against enumeration and play."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.tictactoe import OPPONENTS, TicTacToe, TicTacToeOptions, board_of
from coterie.scenarios.tictactoe_rules import (
    EMPTY,
    LINES,
    SYMMETRIES,
    Board,
    after,
    best_moves,
    free,
    lost,
    over,
    representative,
    value,
)
from coterie.types import Observation, Scripted, SeatId, Split
from tests.support.tables import exact, make_task, play

Policy = Callable[[Board], Sequence[float]]


def game(**options: Any) -> TicTacToe:
    return TicTacToe(TicTacToeOptions.model_validate(options))


def drawn(rows: str) -> Board:
    """A board from "xo. .x. ..o": x own, o the other's."""
    return tuple(".xo".index(mark) for mark in rows.replace(" ", ""))


def reachable() -> set[Board]:
    found, waiting = {EMPTY}, [EMPTY]
    while waiting:
        board = waiting.pop()
        for then in [] if over(board) else [after(board, cell) for cell in free(board)]:
            if then not in found:
                found.add(then)
                waiting.append(then)
    return found


BOARDS = reachable()


def cells(*digits: int, scenario: TicTacToe | None = None, **content: Any) -> Any:
    """Play these cells in turn."""
    said = iter(map(str, digits))
    task = make_task(content=content, max_steps=5, required_models=2)
    outcome, table = play(scenario or game(symmetry=False), task, answer=lambda seat, seen, choices, rng: next(said))
    assert not list(said), "the game ended early"
    return outcome, table


def test_there_are_as_many_boards_as_known() -> None:
    assert len(BOARDS) == 5478
    assert sum(map(over, BOARDS)) == 958
    assert len({representative(board) for board in BOARDS}) == 765
    assert all(
        set(map(frozenset, LINES)) == {frozenset(order[c] for c in line) for line in LINES} for order in SYMMETRIES
    )


def test_equal_boards_have_one_representative_and_one_value() -> None:
    for board in random.Random(0).sample(sorted(BOARDS), 200):
        alike = {tuple(board[cell] for cell in order) for order in SYMMETRIES}
        assert {representative(other) for other in alike} == {representative(board)} <= alike
        assert len({value(other) for other in alike}) == 1


@pytest.mark.parametrize(
    ("board", "worth", "best"),
    [
        ("... ... ...", 0.5, (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        ("xx. oo. ...", 1.0, (2,)),
        ("oo. .x. ...", 0.5, (2,)),
        ("o.. ... ...", 0.5, (4,)),
        (".o. .o. x..", 0.5, (7,)),
        ("o.o .x. x.o", 0.0, (1, 3, 5, 7)),
    ],
)
def test_perfect_play(board: str, worth: float, best: tuple[int, ...]) -> None:
    assert value(drawn(board)) == worth
    assert best_moves(drawn(board)) == best


@pytest.mark.parametrize(
    ("first", "digits", "score"),
    [
        ("player", (1, 4, 2, 5, 3), 1.0),
        ("opponent", (1, 4, 2, 5, 3), 0.0),
        ("player", (1, 4, 2, 5, 9, 6), 0.0),
        ("opponent", (1, 4, 2, 5, 9, 6), 1.0),
        ("player", (1, 5, 9, 3, 7, 4, 6, 8, 2), 0.5),
        ("player", (1, 2, 5, 3, 9), 1.0),
        ("player", (1, 2, 3, 4, 5, 6, 8, 9, 7), 1.0),
    ],
)
def test_plays_are_scored_by_the_rules(first: str, digits: tuple[int, ...], score: float) -> None:
    outcome, table = cells(*digits, opponent="model", first=first)
    assert outcome.scores == {"player": score, "opponent": 1 - score}
    results = {"win": float(score == 1), "draw": float(score == 0.5), "loss": float(score == 0)}
    assert outcome.metrics == {**results, "first": float(first == "player")}
    assert len(table[first].turns) == (len(digits) + 1) // 2


def test_each_seat_sees_its_own_cells_as_x_and_may_take_free_ones_only() -> None:
    _, table = cells(1, 5, 2, 3, 7, 4, 6, 8, 9, opponent="model", first="opponent")
    assert [seen.prefix for seen in table["player"].shown[:2]] == ["o23456789:", "oo34x6789:"]
    assert table["opponent"].shown[1].prefix == "x234o6789:"
    assert game().choices(drawn("xo. .x. ..o")) == ("3", "4", "6", "7", "8")
    assert game().shown(drawn("xo. .x. ..o"), "en").prefix == "xo34x678o:"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_prompt_tells_the_whole_board(language: str) -> None:
    scenario = game()
    for board in BOARDS:
        if not over(board):
            assert board_of(scenario.shown(board, language)) == board
    with pytest.raises(ScenarioError, match="there is no board in 'xo3:'"):
        board_of(Observation("Your cell?", prefix="xo3:"))


@pytest.mark.parametrize(("symmetry", "prompts"), [(True, 1), (False, 4)])
def test_with_symmetry_equal_boards_are_shown_alike(symmetry: bool, prompts: int) -> None:
    shown = set()
    for corner in (1, 3, 7, 9):
        said = iter([str(corner)])
        _, table = play(
            game(symmetry=symmetry),
            make_task(content={"opponent": "model"}, max_steps=5),
            answer=lambda seat, seen, choices, rng, said=said: next(said, choices[0]),  # type: ignore[misc]
        )
        shown.add(table["opponent"].shown[0])
    assert len(shown) == prompts


def test_tasks_take_opponents_and_who_begins_in_turn() -> None:
    scenario = game(opponents=["random", "minimax", "model"], reward_pool=2.0)
    drawn_tasks = [(t.content["opponent"], t.content["first"]) for t in islice(scenario.tasks(Split.TRAIN, 0), 7)]
    assert drawn_tasks == [
        ("random", "player"), ("random", "opponent"), ("minimax", "player"), ("minimax", "opponent"),
        ("model", "player"), ("model", "opponent"), ("random", "player"),
    ]  # fmt: skip
    heldout = list(scenario.tasks(Split.HELDOUT, 0))
    assert heldout[0].content["opponent"] == "model", "exact figures are of both models"
    assert Counter((t.content["opponent"], t.content["first"]) for t in heldout) == dict.fromkeys(set(drawn_tasks), 50)
    assert len({task.task_id for task in heldout}) == 300
    seats = [scenario.seats(task)[1].player for task in islice(scenario.tasks(Split.TRAIN, 0), 0, 6, 2)]
    assert seats == [Scripted("random"), Scripted("minimax"), None]


def test_minimax_never_loses_and_beats_who_errs() -> None:
    scenario = game()
    for seed in range(50):
        for first in ("player", "opponent"):
            task = make_task(content={"opponent": "minimax", "first": first}, max_steps=5)
            outcome, _ = play(
                scenario,
                task,
                seed=seed,
                answer=lambda seat, seen, choices, rng: scenario.scripts["random" if seat == "player" else "minimax"](
                    seen, choices, rng
                ),
            )
            assert outcome.scores["opponent"] >= 0.5
    assert scenario.scripts["minimax"](scenario.shown(drawn("xx. oo. ..."), "zh"), (), random.Random(0)) == "3"


def test_minimax_takes_equally_good_moves_alike() -> None:
    rng, scenario = random.Random(1), game()
    seen = scenario.shown(EMPTY, "en")
    taken = Counter(scenario.scripts["minimax"](seen, (), rng) for _ in range(900))
    assert set(taken) == set("123456789")
    assert min(taken.values()) > 60


def drawn_policy(seed: int) -> Policy:
    """A fixed policy that treats every board differently."""

    def policy(board: Board) -> list[float]:
        weights = [random.Random(f"{seed}{board}{cell}").random() ** 3 for cell in free(board)]
        return [w / sum(weights) for w in weights]

    return policy


def asked(policy: Policy) -> Any:
    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> Sequence[float]:
        return policy(board_of(seen))

    return probabilities


def turned_back(policy: Policy) -> Policy:
    """The same policy on boards that do not turn: what it does at the representative, turned back."""

    def alike(board: Board) -> list[float]:
        order = next(o for o in SYMMETRIES if tuple(board[c] for c in o) == representative(board))
        shares = dict(zip(free(representative(board)), policy(representative(board)), strict=True))
        back = {order[cell]: share for cell, share in shares.items()}
        return [back[cell] for cell in free(board)]

    return alike


def by_enumeration(policy: Policy, opponent: str, begins: bool) -> list[float]:
    """(win, draw, loss) of a policy, by walking every game on boards that do not turn."""

    def end(board: Board, own_turn: bool) -> list[float]:
        if over(board):
            return [0.0, 1.0, 0.0] if not lost(board) else [0.0, 0.0, 1.0] if own_turn else [1.0, 0.0, 0.0]
        shares = dict(zip(free(board), policy(board), strict=True)) if own_turn else OPPONENTS[opponent](board)
        total = [0.0, 0.0, 0.0]
        for cell, share in shares.items():
            if share > 0:
                below = end(after(board, cell), not own_turn)
                total = [t + share * b for t, b in zip(total, below, strict=True)]
        return total

    return end(EMPTY, begins)


def test_exact_equals_the_sum_over_all_games() -> None:
    policy = drawn_policy(3)
    figures = exact(game(symmetry=False), probabilities=asked(policy))
    first, second = by_enumeration(policy, "minimax", True), by_enumeration(policy, "minimax", False)
    assert figures["minimax_loss_first"] == pytest.approx(first[2])
    assert figures["minimax_loss_second"] == pytest.approx(second[2])
    assert figures["minimax_win"] == pytest.approx((first[0] + second[0]) / 2)
    assert figures["minimax_draw"] == pytest.approx((first[1] + second[1]) / 2)
    assert figures["minimax_unbeaten"] == pytest.approx(1 - figures["minimax_loss"])
    assert figures["unresolved"] == 0


def test_exact_of_random_and_of_perfect_play() -> None:
    figures = exact(game())
    # random against random: the first wins 58.5 %, the second 28.8 %
    assert figures["random_loss_first"] == pytest.approx(121 / 420)
    assert figures["random_loss_second"] == pytest.approx(737 / 1260)
    assert figures["random_draw"] == pytest.approx(8 / 63)
    assert figures["minimax_win"] == 0
    perfect: Policy = lambda board: [float(cell == best_moves(board)[0]) for cell in free(board)]  # noqa: E731
    figures = exact(game(), probabilities=asked(perfect))
    assert figures["minimax_draw"] == pytest.approx(1.0)
    assert figures["random_loss"] == 0
    # the first of equally good moves need not be the one a random player errs after: perfect play draws there, too
    first, second = (by_enumeration(turned_back(perfect), "random", begins) for begins in (True, False))
    assert figures["random_win"] == pytest.approx((first[0] + second[0]) / 2)
    assert figures["random_draw"] == pytest.approx((first[1] + second[1]) / 2)


def test_symmetry_changes_prompts_and_not_results() -> None:
    policy = drawn_policy(4)
    turned = exact(game(), probabilities=asked(policy))
    straight = exact(game(symmetry=False), probabilities=asked(turned_back(policy)))
    assert turned == pytest.approx(straight)


def test_exact_asks_every_board_once() -> None:
    boards: list[Board] = []

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        boards.append(board_of(seen))
        return [1 / len(choices)] * len(choices)

    exact(game(), probabilities=probabilities)
    assert len(boards) == len(set(boards)) == 765 - 138


def test_what_is_not_followed_is_told_and_bounds_the_error() -> None:
    policy = asked(drawn_policy(5))
    whole, cut = exact(game(), probabilities=policy), exact(game(exact_floor=0.01), probabilities=policy)
    assert 0 < cut["unresolved"] < 1
    for name in ("minimax_loss", "minimax_draw", "random_win", "random_unbeaten"):
        assert cut[name] <= whole[name] + 1e-12
        assert whole[name] <= cut[name] + cut["unresolved"] + 1e-12


def test_against_another_model_both_are_measured() -> None:
    perfect: Policy = lambda board: [float(cell == best_moves(board)[0]) for cell in free(board)]  # noqa: E731

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> Sequence[float]:
        return perfect(board_of(seen)) if seat == "opponent" else [1 / len(choices)] * len(choices)

    figures = exact(game(opponents=["minimax", "model"]), probabilities=probabilities)
    # the first training task is against minimax: only the player is measured there
    assert "opponent_minimax_loss" not in figures
    figures = exact(game(opponents=["model"]), probabilities=probabilities)
    assert figures["opponent_minimax_loss"] == 0
    assert figures["minimax_loss"] > 0.8
    assert "opponent_unresolved" not in figures


def test_a_task_without_content_is_against_the_first_opponent() -> None:
    assert game(opponents=["random"]).seats(make_task())[1].player == Scripted("random")


@pytest.mark.parametrize("content", [{"opponent": "stockfish"}, {"first": "x"}, {"opponent": ["minimax"]}])
def test_unknown_contents_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match="opponent must be one of minimax, random, model"):
        game().check_task(make_task(content=content))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opponents": []}, "opponents"),
        ({"opponents": ["perfect"]}, "opponents"),
        ({"exact_floor": 1.0}, "exact_floor"),
        ({"symetry": False}, "did you mean 'symmetry'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("tictactoe", options)
