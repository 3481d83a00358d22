"""OpenSpiel: any game that can be told in text, with OpenSpiel's own NashConv where it is small enough.

    state: chance node -> drawn from the task's seed;  player's node -> its text is shown, a legal action is chosen
    score of a seat = its return, moved to [0, 1] by the least and the greatest utility of the game

Games with simultaneous moves are played through OpenSpiel's turn-based wrapper, which hides what others have chosen.
A seat is shown the information state, which has everything it knows, or the observation, which may have less.

With `exact`, every information state of the game is put to the policies once, and the table of their answers goes into
OpenSpiel's NashConv: what all players together would gain by best responses (Lanctot et al., 2017), 0 in equilibrium.
It is a sum over the whole game tree, so the game must be small: it is walked when the scenario is built, and one with
more than `exact_nodes` nodes is refused then, not after training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.foreign import (
    PROMPTS,
    GameOptions,
    Sandbox,
    attribute,
    distinct,
    game_seed,
    game_tasks,
    load,
    scored,
)
from coterie.scenarios.asking import Question, chosen, distributions
from coterie.scenarios.base import Table
from coterie.types import Observation, Outcome, Seat, Split, TrainingTask

Key = tuple[int, str]
"""(player, its information state)."""


class OpenSpielOptions(GameOptions):
    """Settings of an OpenSpiel game."""

    game: str = "kuhn_poker"
    """As in pyspiel.load_game, parameters included: "leduc_poker" or "kuhn_poker(players=3)"."""
    view: Literal["information_state", "observation"] | None = None
    """What a seat is shown; None: the information state, or the observation of games that have no other."""
    render: str | None = None
    """"module:attr" of a function (state, player) -> text, which shows the seat to move what you want it to see."""
    actions: tuple[str, ...] | None = None
    """Words the actions are shown as, by action number; None: OpenSpiel's own."""
    exact: bool = True
    """Whether NashConv is computed; switch off for games too large for it."""
    exact_nodes: int = Field(default=20_000, ge=1)
    """Most nodes of the game tree with `exact`; NashConv takes some milliseconds for every hundred."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One information state, as it is put to a policy."""

    observation: Observation
    actions: tuple[int, ...]
    choices: tuple[str, ...]


class OpenSpiel:
    """Seats "player_0", "player_1", … take the turns of one game; a move that is forced is made without asking.

    Metrics of `play`: ``moves``, turns of all seats together; ``finished``, whether the game came to its end within
    `max_turns`; ``return_<seat>``, in the game's own units.

    `exact` (only there when switched on): ``nash_conv``; ``exploitability``, NashConv by the number of players;
    ``value_<seat>``, what each expects from the policies; ``gain_<seat>``, what its best response would add.

    Raises:
        ConfigError: the extra is missing, there is no such game, it cannot be told in text, or is too large for
            `exact`.
    """

    Options = OpenSpielOptions
    exact: Callable[[Table], Awaitable[Mapping[str, float]]]

    def __init__(self, options: OpenSpielOptions) -> None:
        self.options = options
        self._spiel = load("pyspiel", extra="openspiel", scenario="openspiel")
        self._game = self._loaded()
        self._view = self._viewed()
        self._render = attribute("render", options.render) if options.render is not None else None
        self._range = self._ranged()
        self._seats = [f"player_{player}" for player in range(self._game.num_players())]
        if options.actions is not None and (
            len(options.actions) != self._game.num_distinct_actions() or not distinct(options.actions)
        ):
            raise ConfigError(
                f"options.actions must be {self._game.num_distinct_actions()} different words, one for every action of "
                f"{options.game}"
            )
        if options.exact:
            self._check_size()
            self.exact = self._exact

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Endless starts of the game; see `game_tasks`."""
        return game_tasks("openspiel", self.options.game, len(self._seats), self.options, split, seed)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(seat) for seat in self._seats]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is of another game."""
        game_seed(task, self.options.game)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        seed = game_seed(task, self.options.game)
        chance, sandbox = random.Random(seed), Sandbox(seed)
        turns = dict.fromkeys(self._seats, 0)
        with sandbox.running(self.options.game):
            state = self._game.new_initial_state()
            self._by_chance(state, chance)
        while not state.is_terminal():
            seat = self._seats[state.current_player()]
            if turns[seat] >= task.max_steps:
                break
            with sandbox.running(self.options.game):
                asked = self._asked(state, table.language)
            action = asked.actions[0]
            if len(asked.actions) > 1:
                turn = await table[seat].act(asked.observation, choices=asked.choices, kind="move")
                action = asked.actions[chosen(turn)]
                turns[seat] += 1
            with sandbox.running(self.options.game):
                state.apply_action(action)
                self._by_chance(state, chance)
        returns = dict(zip(self._seats, map(float, state.returns()), strict=True))
        return Outcome(
            scores=scored(returns, self._range),
            metrics={
                "moves": float(sum(turns.values())),
                "finished": float(state.is_terminal()),
                **{f"return_{seat}": value for seat, value in returns.items()},
            },
        )

    async def _exact(self, table: Table) -> dict[str, float]:
        """OpenSpiel's NashConv of the policies at `table`; see the class. No turn is taken, nothing is sampled."""
        asked = {key: found for key, found in self._walk(table.language) if len(found.actions) > 1}
        answers = await distributions(
            table,
            {key: Question(self._seats[key[0]], found.observation, found.choices) for key, found in asked.items()},
        )
        probabilities: dict[Key, dict[int, float]] = {}
        for key, found in asked.items():
            answer = answers[key]
            # what engines round away would make the values of the game drift
            total = math.fsum(answer)
            probabilities[key] = {action: p / total for action, p in zip(found.actions, answer, strict=True)}
        policy_module = load("open_spiel.python.policy", extra="openspiel", scenario="openspiel")
        measures = load("open_spiel.python.algorithms.exploitability", extra="openspiel", scenario="openspiel")
        values = load("open_spiel.python.algorithms.expected_game_score", extra="openspiel", scenario="openspiel")

        def answered(state: Any) -> dict[int, float]:
            player = state.current_player()
            known = probabilities.get((player, state.information_state_string(player)))
            return dict.fromkeys(state.legal_actions(), 1.0) if known is None else known

        with Sandbox(0).running(f"NashConv of {self.options.game}"):
            policy = policy_module.tabular_policy_from_callable(self._game, answered)
            found = measures.nash_conv(self._game, policy, return_only_nash_conv=False)
            value = values.policy_value(self._game.new_initial_state(), [policy] * len(self._seats))
        gains = [float(gain) for gain in found.player_improvements]
        figures = {"nash_conv": float(found.nash_conv), "exploitability": float(found.nash_conv) / len(self._seats)}
        figures.update({f"value_{seat}": float(value[player]) for player, seat in enumerate(self._seats)})
        figures.update({f"gain_{seat}": gains[player] for player, seat in enumerate(self._seats)})
        return figures

    def shown(self, state: Any, player: int, language: str) -> Observation:
        """What `player` is shown at `state`, a pyspiel.State."""
        if self._render is not None:
            told = str(self._render(state, player))
        elif self._view == "information_state":
            told = state.information_state_string(player)
        else:
            told = state.observation_string(player)
        who = PROMPTS[language]["player"].format(player=self._seats[player])
        system, prefix = self.options.opening(language)
        return Observation(system=system, user="\n".join(part for part in (who, told.strip()) if part), prefix=prefix)

    def _asked(self, state: Any, language: str) -> _Asked:
        player = state.current_player()
        actions = tuple(state.legal_actions())
        names = self.options.actions
        choices = tuple(state.action_to_string(player, a) if names is None else names[a] for a in actions)
        if not distinct(choices):
            choices = tuple(map(str, actions))
        return _Asked(self.shown(state, player, language), actions, choices)

    def _by_chance(self, state: Any, rng: random.Random) -> None:
        """Go on to a player's node, or the end."""
        while not state.is_terminal() and state.is_chance_node():
            actions, weights = zip(*state.chance_outcomes(), strict=True)
            state.apply_action(rng.choices(actions, weights)[0])

    def _walk(self, language: str) -> Iterator[tuple[Key, _Asked]]:
        """Every information state once, with the first node it is met at. Raises `_TooLargeError` past the limit."""
        met: set[Key] = set()
        nodes = 0
        waiting = [self._game.new_initial_state()]
        while waiting:
            state = waiting.pop()
            nodes += 1
            if nodes > self.options.exact_nodes:
                raise _TooLargeError
            if state.is_terminal():
                continue
            if not state.is_chance_node():
                player = state.current_player()
                key = (player, state.information_state_string(player))
                if key not in met:
                    met.add(key)
                    yield key, self._asked(state, language)
            # last in, first out: reversed, so that information states come in the order of the tree
            waiting.extend(state.child(action) for action in reversed(state.legal_actions()))

    # -- what the game is -------------------------------------------------------------------------------------------

    def _loaded(self) -> Any:
        """The game, turn-based. Raises `ConfigError`."""
        name = self.options.game
        try:
            with Sandbox(0).running(name):
                game = self._spiel.load_game(name)
        except ScenarioError as error:
            said = str(error.__cause__).partition("\n")[0]
            raise ConfigError(
                f"OpenSpiel cannot load {name!r}: {said[:300]}; pyspiel.registered_names() lists its games"
            ) from error
        dynamics = self._spiel.GameType.Dynamics
        kind = game.get_type()
        if kind.dynamics == dynamics.MEAN_FIELD:
            raise ConfigError(f"{name!r} is a mean-field game; those have no seats to play at")
        return self._spiel.convert_to_turn_based(game) if kind.dynamics == dynamics.SIMULTANEOUS else game

    def _viewed(self) -> str | None:
        """What is shown. Raises `ConfigError` for a game without text."""
        kind = self._game.get_type()
        has = {
            "information_state": kind.provides_information_state_string,
            "observation": kind.provides_observation_string,
        }
        if self.options.view is not None and not has[self.options.view]:
            raise ConfigError(f"{self.options.game!r} has no {self.options.view} text; leave view out, or give render")
        found: str | None = self.options.view or next((view for view, there in has.items() if there), None)
        if found is None and self.options.render is None:
            raise ConfigError(f"{self.options.game!r} shows its players no text; give render")
        return found

    def _ranged(self) -> tuple[float, float]:
        if self.options.reward_range is not None:
            return self.options.reward_range
        low, high = float(self._game.min_utility()), float(self._game.max_utility())
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(
                f"{self.options.game!r} has utilities from {low:g} to {high:g}; give reward_range, the least and the "
                "greatest return of one player"
            )
        return low, high

    def _check_size(self) -> None:
        """Raises `ConfigError` for a game whose NashConv cannot be computed."""
        if not self._game.get_type().provides_information_state_string:
            raise ConfigError(
                f"{self.options.game!r} has no information states, which NashConv needs; set exact = false"
            )
        try:
            with Sandbox(0).running(self.options.game):
                for _ in self._walk("en"):
                    pass
        except _TooLargeError:
            raise ConfigError(
                f"{self.options.game!r} has more than {self.options.exact_nodes} nodes, too many for exact metrics; "
                "set exact = false, or raise exact_nodes if you can wait"
            ) from None


class _TooLargeError(ScenarioError):
    """A game tree has more nodes than may be walked."""


__all__ = ["OpenSpiel", "OpenSpielOptions"]
