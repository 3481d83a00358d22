"""Games in turns: the tree, exact values and best responses against enumeration and known results."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios import sequential
from coterie.scenarios.poker import kuhn_equilibrium
from coterie.scenarios.poker_rules import KUHN, LEDUC
from coterie.scenarios.sequential import (
    CHANCE,
    TERMINAL,
    GameTree,
    best_response,
    expected_returns,
    gains,
    game_tree,
    nash_conv,
    uniform,
)
from tests.support.work import lines

Path = tuple[Any, ...]


class Drawn:
    """A game given by a nested tuple: ("chance", {p: below}), (player, information, {action: below}) or returns."""

    def __init__(self, root: Any, players: int = 2) -> None:
        self.root, self.players = root, players

    def initial(self) -> Path:
        return ()

    def _at(self, path: Path) -> Any:
        node = self.root
        for step in path:
            node = node[-1][step]
        return node

    def mover(self, path: Path) -> int:
        node = self._at(path)
        if isinstance(node, list):
            return TERMINAL
        return CHANCE if node[0] == "chance" else int(node[0])

    def chances(self, path: Path) -> Sequence[tuple[Any, float]]:
        return [(p, p) for p in self._at(path)[1]]

    def actions(self, path: Path) -> Sequence[Any]:
        return tuple(self._at(path)[2])

    def after(self, path: Path, action: Any) -> Path:
        return (*path, action)

    def information(self, path: Path) -> Any:
        return self._at(path)[1]

    def returns(self, path: Path) -> Sequence[float]:
        found: list[float] = self._at(path)
        return found


PENNIES = Drawn(
    (
        0,
        "p0",
        {"h": (1, "p1", {"h": [1, -1], "t": [-1, 1]}), "t": (1, "p1", {"h": [-1, 1], "t": [1, -1]})},
    )
)


def random_policies(tree: GameTree, seed: int) -> list[dict[Any, list[float]]]:
    rng = random.Random(seed)
    policies: list[dict[Any, list[float]]] = [{} for _ in range(tree.players)]
    for here in tree.information_states:
        weights = [rng.random() ** 3 for _ in here.actions]
        policies[here.player][here.information] = [w / sum(weights) for w in weights]
    return policies


def best_by_enumeration(tree: GameTree, policies: list[Any], player: int) -> float:
    """The best of all pure policies."""
    own = tree.of(player)
    best = float("-inf")
    for picks in product(*(range(len(here.actions)) for here in own)):
        pure = {
            here.information: [float(a == pick) for a in range(len(here.actions))]
            for here, pick in zip(own, picks, strict=True)
        }
        tried = [pure if p == player else policies[p] for p in range(tree.players)]
        best = max(best, expected_returns(tree, tried)[player])
    return best


def cfr_plus(tree: GameTree, iterations: int) -> list[dict[Any, list[float]]]:
    """Average policies of CFR+ (Tammelin 2014), which converge to equilibrium; independent of best responses."""
    shapes = [len(here.actions) for here in tree.information_states]
    regret = [[0.0] * n for n in shapes]
    average = [[0.0] * n for n in shapes]
    for iteration in range(1, iterations + 1):
        for player in range(2):
            rows = [[r / sum(row) if sum(row) > 0 else 1 / len(row) for r in row] for row in regret]
            own, other = [1.0] * len(tree.mover), [1.0] * len(tree.mover)
            for number, mover in enumerate(tree.mover):
                weights = tree.chance[number] or (rows[tree.place[number]] if tree.children[number] else ())
                for w, child in zip(weights, tree.children[number], strict=True):
                    own[child] = own[number] * (w if mover == player else 1.0)
                    other[child] = other[number] * (1.0 if mover == player else w)
            values = [row[player] if row else 0.0 for row in tree.returns]
            for number in reversed(range(len(tree.mover))):
                if below := tree.children[number]:
                    weights = tree.chance[number] or rows[tree.place[number]]
                    values[number] = sum(w * values[child] for w, child in zip(weights, below, strict=True))
            for at, here in enumerate(tree.information_states):
                if here.player != player:
                    continue
                for action in range(len(here.actions)):
                    gain = sum(other[h] * (values[tree.children[h][action]] - values[h]) for h in here.states)
                    regret[at][action] = max(0.0, regret[at][action] + gain)
                    average[at][action] += iteration * own[here.states[0]] * rows[at][action]
    policies: list[dict[Any, list[float]]] = [{}, {}]
    for at, here in enumerate(tree.information_states):
        total = sum(average[at])
        policies[here.player][here.information] = [a / total if total > 0 else 1 / shapes[at] for a in average[at]]
    return policies


def test_matching_pennies() -> None:
    tree = game_tree(PENNIES)
    assert len(tree.mover) == 7
    assert [here.states for here in tree.information_states] == [(0,), (1, 4)]
    heads = [{"p0": [1.0, 0.0]}, {"p1": [0.75, 0.25]}]
    assert expected_returns(tree, heads) == pytest.approx((0.5, -0.5))
    assert best_response(tree, heads, 1) == (pytest.approx(1.0), {"p1": 1})
    assert gains(tree, heads) == pytest.approx((0.0, 1.5))
    assert nash_conv(tree, heads) == pytest.approx(1.5)
    assert nash_conv(tree, uniform(tree)) == 0.0


def test_chance_and_three_players() -> None:
    game = Drawn(
        ("chance", {0.25: (2, "up", {"l": [1, 2, 3], "r": [0, 0, 4]}), 0.75: (1, "down", {"x": [4, 0, 0]})}), 3
    )
    tree = game_tree(game)
    policies = [{}, {"down": [1.0]}, {"up": [0.5, 0.5]}]
    assert expected_returns(tree, policies) == pytest.approx((3.125, 0.25, 0.875))
    assert best_response(tree, policies, 2) == (pytest.approx(1.0), {"up": 1})
    assert gains(tree, policies) == pytest.approx((0, 0, 0.125))


@pytest.mark.parametrize("seed", range(3))
def test_kuhn_best_responses_equal_enumeration(seed: int) -> None:
    tree = game_tree(KUHN)
    policies = random_policies(tree, seed)
    for player in (0, 1):
        value, actions = best_response(tree, policies, player)
        assert value == pytest.approx(best_by_enumeration(tree, policies, player), abs=1e-12)
        pure = {
            here.information: [float(a == actions[here.information]) for a in range(len(here.actions))]
            for here in tree.of(player)
        }
        followed = [pure if p == player else policies[p] for p in (0, 1)]
        assert expected_returns(tree, followed)[player] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("bluff", [0.0, 0.1, 1 / 3])
def test_every_kuhn_equilibrium_has_nash_conv_zero_and_the_known_value(bluff: float) -> None:
    tree = game_tree(KUHN)
    policies = kuhn_equilibrium(bluff)
    assert nash_conv(tree, policies) == pytest.approx(0.0, abs=1e-12)
    assert expected_returns(tree, policies)[0] == pytest.approx(-1 / 18, abs=1e-12)
    assert KUHN.value == -1 / 18


def test_uniform_policies_are_as_exploitable_as_the_literature_says() -> None:
    kuhn, leduc = game_tree(KUHN), game_tree(LEDUC)
    assert nash_conv(kuhn, uniform(kuhn)) == pytest.approx(11 / 12, abs=1e-12)
    # OpenSpiel's figure for its leduc_poker, where suits are told apart
    assert nash_conv(leduc, uniform(leduc)) == pytest.approx(4.747222222222222, abs=1e-9)


def test_leduc_is_computed_fast_enough_to_be_watched_in_training() -> None:
    tree = game_tree(LEDUC)
    policies = random_policies(tree, 0)
    assert lines(lambda: nash_conv(tree, policies)) < 60 * len(tree.mover)


def test_the_value_of_leduc_is_where_equilibria_are() -> None:
    tree = game_tree(LEDUC)
    policies = cfr_plus(tree, 150)
    distance = nash_conv(tree, policies)
    assert distance < 0.02
    # the value is inside what each side can guarantee
    assert abs(expected_returns(tree, policies)[0] - LEDUC.value) <= distance
    most, least = best_response(tree, policies, 0)[0], -best_response(tree, policies, 1)[0]
    assert least - 1e-6 <= LEDUC.value <= most + 1e-6


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (("chance", {0.5: [0, 0], 0.4: [0, 0]}), "do not sum to 1"),
        ((0, "a", {}), "no legal action"),
        ((0, "a", {"x": [1]}), "each of 2 players"),
        ((0, "a", {"x": [1, float("nan")]}), "each of 2 players"),
        ((0, "a", {"x": (0, "a", {"x": [0, 0]})}), "no perfect recall"),
        ((0, "a", {"x": (1, "b", {"x": [0, 0]}), "y": (1, "b", {"z": [0, 0]})}), "tell states apart"),
        ((0, "a", {"x": (0, "b", {"z": [0, 0]}), "y": (0, "b", {"z": [0, 0]})}), "no perfect recall"),
    ],
)
def test_games_that_are_none_are_refused(root: Any, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        game_tree(Drawn(root))


def test_a_game_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "MAX_STATES", 50)
    with pytest.raises(ScenarioError, match="PokerRules has more than 50 states"):
        game_tree(LEDUC)


@pytest.mark.parametrize("row", [(), (1.0,), (0.5, 0.4), (1.5, -0.5), (float("nan"), 0.5)])
def test_policies_that_are_none_are_refused(row: tuple[float, ...]) -> None:
    tree = game_tree(PENNIES)
    with pytest.raises(ScenarioError, match="player 1 at 'p1'"):
        nash_conv(tree, [{"p0": (0.5, 0.5)}, {"p1": row}])
    with pytest.raises(ScenarioError, match="1 policies for a game of 2"):
        nash_conv(tree, [{"p0": (0.5, 0.5)}])
