"""PettingZoo: both interfaces, masks, rewards by hand, and observations told in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from pettingzoo import ParallelEnv

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.pettingzoo import PettingZoo, PettingZooOptions, told_as_numbers
from coterie.scenarios.base import build_scenario
from tests.support.tables import make_task, play, saying

RPS = {"env": "classic/rps-v2", "interface": "parallel"}
OWN = "tests.games.test_pettingzoo"


def game(**options: Any) -> PettingZoo:
    return PettingZoo(PettingZooOptions.model_validate(options))


# -- one after another ------------------------------------------------------------------------------------------------


def test_a_board_game_won_by_hand() -> None:
    scenario = game()
    assert [seat.seat_id for seat in scenario.seats(make_task())] == ["player_1", "player_2"]
    outcome, table = play(scenario, answer=saying({"player_1": ["0", "1", "2"], "player_2": ["3", "4"]}))
    assert outcome.scores == {"player_1": 1.0, "player_2": 0.0}
    assert outcome.metrics == {"moves": 5, "finished": 1, "reward_player_1": 1, "reward_player_2": -1}
    assert table["player_1"].shown[2].user.splitlines() == ["You are player_1.", "1 1 .", "2 2 .", ". . ."]
    assert table["player_2"].shown[1].user.splitlines() == ["You are player_2.", "2 2 .", "1 . .", ". . ."]


def test_masked_actions_are_no_choices() -> None:
    offered = []

    def first(seat: str, seen: Any, choices: Sequence[str], rng: Any) -> str:
        offered.append(tuple(choices))
        return choices[0]

    play(game(), answer=first)
    assert offered[:3] == [tuple("012345678"), tuple("12345678"), tuple("2345678")]


def test_a_game_that_takes_too_long_ends_with_what_was_earned() -> None:
    outcome, _ = play(game(max_turns=2))
    assert outcome.scores == {"player_1": 0.5, "player_2": 0.5}
    assert outcome.metrics["finished"] == 0
    assert outcome.metrics["moves"] == 4


# -- all at once ------------------------------------------------------------------------------------------------------


def test_simultaneous_moves_by_hand() -> None:
    scenario = game(**RPS, env_options={"max_cycles": 3}, reward_range=[-3, 3], actions=["rock", "paper", "scissors"])
    turns = {"player_0": ["rock", "paper", "rock"], "player_1": ["scissors", "rock", "rock"]}
    outcome, table = play(scenario, answer=saying(turns))
    assert outcome.metrics["reward_player_0"] == 2 == -outcome.metrics["reward_player_1"]
    assert outcome.scores == pytest.approx({"player_0": 5 / 6, "player_1": 1 / 6})
    assert [seen.user.splitlines()[1] for seen in table["player_0"].shown] == ["3", "2", "0"], "what the other did"
    outcome, _ = play(
        game(**RPS, reward_range=[-15, 15], max_turns=2),
        answer=saying({"player_0": ["0", "1"], "player_1": ["2", "0"]}),
    )
    assert (outcome.metrics["reward_player_0"], outcome.metrics["finished"]) == (2, 0)


class Lottery(ParallelEnv):  # type: ignore[misc]  # the package has no types for this
    """Each draws a number from the global generator; actions begin at 1, the second is masked for "b"."""

    metadata = {"name": "lottery"}  # noqa: RUF012 - as the package wants it

    def __init__(self, kind: str = "discrete") -> None:
        self.possible_agents = ["a", "b"]
        self._space = spaces.Discrete(3, start=1) if kind == "discrete" else spaces.Box(0, 1)
        self.taken: list[Any] = []

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(0, 1, (1,))

    def action_space(self, agent: str) -> Any:
        return self._space

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents = list(self.possible_agents)
        drawn = {agent: np.array([np.random.random()]) for agent in self.agents}
        return drawn, {"a": {}, "b": {"action_mask": np.array([1, 0, 1])}}

    def step(self, actions: Mapping[str, int]) -> Any:
        rewards = {agent: 0.1 * action for agent, action in actions.items()}
        self.agents = []
        ended = dict.fromkeys(actions, True)
        return {}, rewards, ended, dict.fromkeys(actions, False), {agent: {} for agent in actions}


def telling(observation: Any, agent: str, env: Any) -> str:
    return f"{agent} of {env.metadata['name']}: {observation[0]:.6f}"


def test_ones_own_environment_with_masks_in_infos_and_actions_from_one() -> None:
    scenario = game(env=f"{OWN}:Lottery", render=f"{OWN}:telling", reward_range=[0, 1])
    offered = {}

    def last(seat: str, seen: Any, choices: Sequence[str], rng: Any) -> str:
        offered[seat] = tuple(choices)
        return choices[-1]

    outcome, table = play(scenario, answer=last)
    assert offered == {"a": ("1", "2", "3"), "b": ("1", "3")}
    assert outcome.scores == pytest.approx({"a": 0.3, "b": 0.3})
    assert table["a"].shown[0].user.startswith("You are a.\na of lottery: 0.")
    task = make_task(content={"game": f"{OWN}:Lottery", "game_seed": 4})
    shown = [play(scenario, task, seed=seed)[1]["a"].shown[0] for seed in (1, 2)]
    assert shown[0] == shown[1], "what it draws is decided by the task"
    other = make_task(content={"game": f"{OWN}:Lottery", "game_seed": 6})
    assert play(scenario, other)[1]["a"].shown[0] != shown[0]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_observations_in_numbers() -> None:
    assert told_as_numbers(3) == "3"
    assert told_as_numbers(np.array([1, 2, 3], dtype=np.int8)) == "1 2 3"
    assert told_as_numbers(np.array([[0.5, 1.0], [0.25, -2.0]])) == "0.5 1\n0.25 -2"
    assert told_as_numbers({"observation": np.array([1]), "action_mask": np.array([1, 0])}) == "1"
    assert told_as_numbers({"hand": np.array([1]), "table": np.array([2, 3])}) == "hand: 1\ntable: 2 3"
    planes = np.zeros((2, 2, 2), dtype=np.int8)
    planes[0, 0, 0] = planes[1, 1, 1] = 1
    assert told_as_numbers(planes) == "1 .\n. 2"
    planes[0, 0, 1] = 1
    assert told_as_numbers(planes) == "1 1\n0 0\n0 0\n0 1", "a cell of two planes is no board"
    for odd in (np.zeros((30, 30)), "text", np.array(["a"])):
        with pytest.raises(ScenarioError, match=r"function \(observation, agent, environment\)"):
            told_as_numbers(odd)


# -- what cannot be played --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "classic/tictactoe-v4"}, "aec registry has no 'classic/tictactoe-v4'.*did you mean"),
        ({"interface": "parallel"}, "parallel registry has no 'classic/tictactoe-v3'"),
        ({"env": "pettingzoo.classic.tictactoe.tictactoe:enf"}, "has no 'enf'"),
        ({"env": "pettingzoo.classic.nothing:env"}, "cannot import 'pettingzoo.classic.nothing'"),
        ({"env": "nowhere:env"}, "cannot import 'nowhere'"),
        ({"env": "collections:Counter"}, "cannot be started"),
        ({"env_options": {"size": 3}}, "cannot be started with {'size': 3}"),
        ({"env": f"{OWN}:Lottery", "env_options": {"kind": "box"}}, "only Discrete can be chosen"),
        ({"actions": ["a", "b"]}, "must be 9 different words"),
        ({"render": "nowhere"}, 'write it as "module:attr"'),
        ({"environment": "x"}, "unknown key 'environment'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("pettingzoo", options)


def test_rewards_beyond_the_range_fail_the_episode() -> None:
    turns = {"player_0": ["0"] * 3, "player_1": ["2"] * 3}
    with pytest.raises(ScenarioError, match=r"reward of 3, outside reward_range \[-1, 1\]"):
        play(game(**RPS, env_options={"max_cycles": 3}), answer=saying(turns))
