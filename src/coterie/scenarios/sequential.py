"""Finite games in turns, with chance and hidden information, and what can be computed of them exactly.

    state --chance or a player moves--> state --...--> terminal state: a return for every player

Where players cannot tell states apart they share an *information state*, and a policy gives each of those one set of
probabilities. With perfect recall (a player forgets neither what it saw nor what it did) a best response is found by
one walk over the tree: at an information state of the responder,

    best action = argmax over actions of   sum over its states h of   reach(h) * value(h after action)

where reach(h) is the probability that chance and the others lead to h. Against fixed policies pi,

    NashConv(pi) = sum over players i of   (value of a best response to the others - value of pi_i)

(Lanctot et al. 2017, "A unified game-theoretic approach to multiagent reinforcement learning"); it is 0 exactly in a
Nash equilibrium. Nothing here samples or knows of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from coterie.errors import ScenarioError

CHANCE: Final = -1
TERMINAL: Final = -2

MAX_STATES: Final = 200_000
"""Most states of a game whose whole tree is kept."""
MAX_DEPTH: Final = 200
"""Most moves of one play of it."""

Action = Hashable
Information = Hashable
Policy = Mapping[Information, Sequence[float]]
"""Of one player: for each of its information states, a probability for each of the legal actions, in their order."""

State = TypeVar("State")


class SequentialGame(Protocol[State]):
    """The rules. States are values: nothing is changed in place."""

    @property
    def players(self) -> int: ...

    def initial(self) -> State: ...

    def mover(self, state: State) -> int:
        """The player whose turn it is, from 0; `CHANCE`; or `TERMINAL`."""
        ...

    def chances(self, state: State) -> Sequence[tuple[Action, float]]:
        """Where chance moves: what may happen, and how probable it is."""
        ...

    def actions(self, state: State) -> Sequence[Action]:
        """Where a player moves: its legal actions, the same and in the same order in all of an information state."""
        ...

    def after(self, state: State, action: Action) -> State: ...

    def information(self, state: State) -> Information:
        """Where a player moves: all it knows."""
        ...

    def returns(self, state: State) -> Sequence[float]:
        """Where the game is over: what each player gets."""
        ...


@dataclass(frozen=True, slots=True)
class InformationState:
    """States the player to move cannot tell apart."""

    player: int
    information: Information
    actions: tuple[Action, ...]
    states: tuple[int, ...]
    """Numbers of its states in the tree."""


@dataclass(frozen=True, slots=True)
class GameTree:
    """Every state of a game, numbered so that what follows a state has a higher number; the start is 0."""

    players: int
    mover: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]
    """Of each state, the states its actions or chances lead to."""
    chance: tuple[tuple[float, ...], ...]
    """Of each state where chance moves, the probabilities of its children; else empty."""
    place: tuple[int, ...]
    """Of each state where a player moves, the index of its information state; else -1."""
    returns: tuple[tuple[float, ...], ...]
    """Of each terminal state, a return for each player; else empty."""
    information_states: tuple[InformationState, ...]

    def of(self, player: int) -> list[InformationState]:
        """The information states of one player, in the order of the tree."""
        return [found for found in self.information_states if found.player == player]


@dataclass(slots=True)
class _Growing:
    """An information state while the tree is built."""

    player: int
    actions: tuple[Action, ...]
    past: tuple[int, int] | None
    """(place, action) of the player's own move before."""
    states: list[int] = field(default_factory=list)


def game_tree(game: SequentialGame[State]) -> GameTree:
    """Walk the whole game.

    Raises:
        ScenarioError: more than `MAX_STATES` states, a play longer than `MAX_DEPTH`, chances that do not sum to 1, a
            state without actions, returns that are not one finite number for each player, legal actions that differ
            inside an information state, or a player that forgets (no perfect recall).
    """
    mover: list[int] = []
    children: list[list[int]] = []
    chance: list[tuple[float, ...]] = []
    place: list[int] = []
    returns: list[tuple[float, ...]] = []
    places: dict[tuple[int, Information], int] = {}
    found: list[_Growing] = []
    nothing: tuple[tuple[int, int] | None, ...] = (None,) * game.players
    waiting: list[tuple[State, int, int, tuple[tuple[int, int] | None, ...]]] = [(game.initial(), -1, 0, nothing)]
    while waiting:
        state, parent, depth, past = waiting.pop()
        number = len(mover)
        if number >= MAX_STATES or depth > MAX_DEPTH:
            raise ScenarioError(
                f"{type(game).__name__} has more than {MAX_STATES} states or plays of more than {MAX_DEPTH} moves; "
                f"it is too large to be computed exactly"
            )
        if parent >= 0:
            children[parent].append(number)
        player = game.mover(state)
        mover.append(player)
        children.append([])
        chance.append(())
        place.append(-1)
        returns.append(())
        if player == TERMINAL:
            returns[number] = _returns(game, state)
        elif player == CHANCE:
            outcomes = game.chances(state)
            chance[number] = tuple(probability for _, probability in outcomes)
            if not math.isclose(math.fsum(chance[number]), 1.0, abs_tol=1e-9) or min(chance[number]) < 0:
                raise ScenarioError(f"the chances at {state!r} are {list(chance[number])}, which do not sum to 1")
            waiting.extend((game.after(state, outcome), number, depth + 1, past) for outcome, _ in reversed(outcomes))
        else:
            here = _visit(game, state, player, past[player], places, found)
            found[here].states.append(number)
            place[number] = here
            for index, action in reversed(list(enumerate(found[here].actions))):
                then = (*past[:player], (here, index), *past[player + 1 :])
                waiting.append((game.after(state, action), number, depth + 1, then))
    information = {at: key for (_, key), at in places.items()}
    return GameTree(
        players=game.players,
        mover=tuple(mover),
        children=tuple(map(tuple, children)),
        chance=tuple(chance),
        place=tuple(place),
        returns=tuple(returns),
        information_states=tuple(
            InformationState(g.player, information[at], g.actions, tuple(g.states)) for at, g in enumerate(found)
        ),
    )


def _returns(game: SequentialGame[State], state: State) -> tuple[float, ...]:
    returns = tuple(map(float, game.returns(state)))
    if len(returns) != game.players or not all(map(math.isfinite, returns)):
        raise ScenarioError(f"the returns at {state!r} are {list(returns)}; each of {game.players} players needs one")
    return returns


def _visit(
    game: SequentialGame[State],
    state: State,
    player: int,
    past: tuple[int, int] | None,
    places: dict[tuple[int, Information], int],
    found: list[_Growing],
) -> int:
    """The index of the information state of `state`, which is new or like those seen before."""
    information, actions = game.information(state), tuple(game.actions(state))
    if not actions:
        raise ScenarioError(f"player {player} is to move at {state!r}, but has no legal action")
    at = places.setdefault((player, information), len(found))
    if at == len(found):
        found.append(_Growing(player, actions, past))
    elif found[at].actions != actions:
        raise ScenarioError(f"player {player} at {information!r} can tell states apart by their legal actions")
    elif found[at].past != past:
        raise ScenarioError(f"player {player} at {information!r} has forgotten what it saw or did (no perfect recall)")
    return at


def uniform(tree: GameTree) -> list[dict[Information, tuple[float, ...]]]:
    """The policies that take every legal action with equal probability, one for each player."""
    return [
        {found.information: (1 / len(found.actions),) * len(found.actions) for found in tree.of(player)}
        for player in range(tree.players)
    ]


def expected_returns(tree: GameTree, policies: Sequence[Policy]) -> tuple[float, ...]:
    """What each player gets on average when all follow their policies.

    Raises:
        ScenarioError: an information state without a probability for each of its actions.
    """
    rows = _rows(tree, policies)
    values: list[tuple[float, ...]] = list(tree.returns)
    for number in reversed(range(len(tree.mover))):
        if tree.mover[number] == TERMINAL:
            continue
        weights = tree.chance[number] or rows[tree.place[number]]
        below = tree.children[number]
        values[number] = tuple(
            math.fsum(w * values[child][player] for w, child in zip(weights, below, strict=True))
            for player in range(tree.players)
        )
    return values[0]


def best_response(tree: GameTree, policies: Sequence[Policy], player: int) -> tuple[float, dict[Information, int]]:
    """The most `player` can get on average while the others keep their policies, and how.

    Args:
        policies: of all players; that of `player` does not matter.

    Returns:
        The value, and the index of the best action at each information state of `player`; the first one of equals.

    Raises:
        ScenarioError: an information state without a probability for each of its actions.
    """
    rows = _rows(tree, policies)
    reach = _reach(tree, rows, player)
    values: dict[int, float] = {}
    best: dict[int, int] = {}

    def choice(at: int) -> int:
        if at not in best:
            here = tree.information_states[at]
            gains = [
                math.fsum(reach[h] * value(tree.children[h][action]) for h in here.states)
                for action in range(len(here.actions))
            ]
            best[at] = gains.index(max(gains))
        return best[at]

    def value(number: int) -> float:
        if number not in values:
            below = tree.children[number]
            if tree.mover[number] == TERMINAL:
                values[number] = tree.returns[number][player]
            elif tree.mover[number] == player:
                values[number] = value(below[choice(tree.place[number])])
            else:
                weights = tree.chance[number] or rows[tree.place[number]]
                values[number] = math.fsum(w * value(child) for w, child in zip(weights, below, strict=True))
        return values[number]

    total = value(0)
    return total, {
        here.information: choice(at) for at, here in enumerate(tree.information_states) if here.player == player
    }


def gains(tree: GameTree, policies: Sequence[Policy]) -> tuple[float, ...]:
    """What each player would gain on average by a best response to the others; never negative."""
    values = expected_returns(tree, policies)
    best = (best_response(tree, policies, player)[0] for player in range(tree.players))
    return tuple(max(0.0, most - value) for most, value in zip(best, values, strict=True))  # rounding may leave -1e-17


def nash_conv(tree: GameTree, policies: Sequence[Policy]) -> float:
    """Sum over the players of what a best response would gain (Lanctot et al., 2017); 0 in equilibrium."""
    return math.fsum(gains(tree, policies))


def _rows(tree: GameTree, policies: Sequence[Policy]) -> list[Sequence[float]]:
    """The probabilities at each information state, checked."""
    if len(policies) != tree.players:
        raise ScenarioError(f"{len(policies)} policies for a game of {tree.players} players; give one for each")
    rows = []
    for here in tree.information_states:
        row = policies[here.player].get(here.information, ())
        if len(row) != len(here.actions) or not abs(math.fsum(row) - 1) <= 1e-6 or min(row) < 0:
            raise ScenarioError(
                f"the policy of player {here.player} at {here.information!r} is {list(row)}; "
                f"it needs probabilities of {list(here.actions)}"
            )
        rows.append(row)
    return rows


def _reach(tree: GameTree, rows: Sequence[Sequence[float]], player: int) -> list[float]:
    """For each state, the probability that chance and everybody but `player` lead there."""
    reach = [1.0] * len(tree.mover)
    for number, mover in enumerate(tree.mover):
        below = tree.children[number]
        weights = tree.chance[number] or ((1.0,) * len(below) if mover == player else rows[tree.place[number]])
        if mover != TERMINAL:
            for weight, child in zip(weights, below, strict=True):
                reach[child] = reach[number] * weight
    return reach
