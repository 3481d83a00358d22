"""PettingZoo: environments of both of its interfaces, with discrete actions and action masks, told in text.

    AEC        one agent after another: last() -> text, choices -> step(action)          a board game
    parallel   all agents at once: observations -> texts, choices -> step(all actions)   a matrix game
    score of a seat = the sum of its agent's rewards, moved to [0, 1] by `reward_range`

PettingZoo's observations are arrays. They are told as numbers, row by row; planes of zeros and ones that mark cells of
one board are told as that board. What suits your environment better is a function (observation, agent, environment) ->
text, named by `render`. Masked actions are no choices, so that every move is legal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from coterie.errors import ConfigError, ScenarioError, nearest
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
from coterie.scenarios.asking import chosen
from coterie.scenarios.base import Table
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TrainingTask

_CELLS = "123456789"
"""How planes of a board are told; "." is a cell in none of them."""
MAX_NUMBERS = 400
"""Numbers of an observation that are told; larger ones need a `render` of their own."""


class PettingZooOptions(GameOptions):
    """Settings of a PettingZoo environment."""

    env: str = "classic/tictactoe-v3"
    """An id of PettingZoo's registry, or "module:attr" of a class or function that makes an environment."""
    interface: Literal["aec", "parallel"] = "aec"
    """Which of the environments that the registry has under this id; what "module:attr" makes shows by itself."""
    env_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments the environment is made with, for example { max_cycles = 10 }."""
    render: str | None = None
    """"module:attr" of a function (observation, agent, environment) -> text; None: the numbers."""
    actions: tuple[str, ...] | None = None
    """Words the actions are shown as, by action number; None: their numbers."""


class PettingZoo:
    """A seat for every possible agent, named like it; a move that is forced is made without asking.

    Metrics: ``moves``, turns of all seats together; ``finished``, whether the environment came to its end within
    `max_turns`; ``reward_<seat>``, in the environment's own units.

    Raises:
        ConfigError: the extra is missing, the environment cannot be made, or its actions are not discrete.
    """

    Options = PettingZooOptions

    def __init__(self, options: PettingZooOptions) -> None:
        self.options = options
        package = load("pettingzoo", extra="pettingzoo", scenario="pettingzoo")
        spaces = load("gymnasium.spaces", extra="pettingzoo", scenario="pettingzoo", package="gymnasium")
        self._make = self._maker(package)
        self._render = attribute("render", options.render) if options.render is not None else None
        self._range = options.reward_range or (-1.0, 1.0)
        try:
            env, _ = self._started(Sandbox(0), 0)
        except ScenarioError as error:
            raise ConfigError(f"{options.env} cannot be started with {options.env_options}: {error}") from error
        if isinstance(env, package.AECEnv):
            self._parallel = False
        elif isinstance(env, package.ParallelEnv):
            self._parallel = True
        else:
            raise ConfigError(f"{options.env} made a {type(env).__name__}, neither an AECEnv nor a ParallelEnv")
        agents = list(env.possible_agents)
        self._agents: dict[Any, SeatId] = {agent: str(agent) for agent in agents}
        self._first_action: dict[Any, int] = {}
        for agent in agents:
            space = env.action_space(agent)
            if not isinstance(space, spaces.Discrete):
                raise ConfigError(
                    f"{options.env}: agent {agent!r} has the actions {space}; only Discrete can be chosen"
                )
            if options.actions is not None and (len(options.actions) != space.n or not distinct(options.actions)):
                raise ConfigError(f"options.actions must be {space.n} different words, one for every action")
            self._first_action[agent] = int(space.start)
        self._count = {agent: int(env.action_space(agent).n) for agent in agents}
        env.close()

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Endless starts of the environment; see `game_tasks`."""
        return game_tasks("pettingzoo", self.options.env, len(self._agents), self.options, split, seed)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(seat) for seat in self._agents.values()]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is of another environment."""
        game_seed(task, self.options.env)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        seed = game_seed(task, self.options.env)
        sandbox = Sandbox(seed)
        env, start = self._started(sandbox, seed)
        turns = dict.fromkeys(self._agents, 0)
        try:
            if self._parallel:
                rewards, finished = await self._simultaneously(env, start, sandbox, task, table, turns)
            else:
                rewards, finished = await self._in_turn(env, sandbox, task, table, turns)
        finally:
            with sandbox.running(self.options.env):
                env.close()
        earned = {seat: rewards[agent] for agent, seat in self._agents.items()}
        return Outcome(
            scores=scored(earned, self._range),
            metrics={
                "moves": float(sum(turns.values())),
                "finished": float(finished),
                **{f"reward_{seat}": reward for seat, reward in earned.items()},
            },
        )

    async def _in_turn(
        self, env: Any, sandbox: Sandbox, task: TrainingTask, table: Table, turns: dict[Any, int]
    ) -> tuple[dict[Any, float], bool]:
        """Rewards by agent, and whether the environment came to its end."""
        rewards = dict.fromkeys(self._agents, 0.0)
        while env.agents:
            with sandbox.running(self.options.env):
                agent = env.agent_selection
                observation, reward, terminated, truncated, info = env.last()
            rewards[agent] += float(reward)
            action = None
            if not (terminated or truncated):
                if turns[agent] >= task.max_steps:
                    return self._paid(env, agent, rewards), False
                action = await self._chosen(env, sandbox, table, agent, (observation, info), turns)
            with sandbox.running(self.options.env):
                env.step(action)
        return rewards, True

    def _paid(self, env: Any, agent: Any, rewards: dict[Any, float]) -> dict[Any, float]:
        """With what the others would have been told of at their next turn; `agent` has just been."""
        return {
            other: reward + (0.0 if other == agent else float(env._cumulative_rewards.get(other, 0.0)))
            for other, reward in rewards.items()
        }

    async def _simultaneously(
        self, env: Any, start: Any, sandbox: Sandbox, task: TrainingTask, table: Table, turns: dict[Any, int]
    ) -> tuple[dict[Any, float], bool]:
        """See `_in_turn`; `start`: what the reset returned, observations and infos."""
        rewards = dict.fromkeys(self._agents, 0.0)
        observations, infos = start
        while env.agents:
            agents = list(env.agents)
            if any(turns[agent] >= task.max_steps for agent in agents):
                return rewards, False
            actions = await asyncio.gather(
                *(
                    self._chosen(env, sandbox, table, agent, (observations[agent], infos.get(agent, {})), turns)
                    for agent in agents
                )
            )
            with sandbox.running(self.options.env):
                observations, earned, _, _, infos = env.step(dict(zip(agents, actions, strict=True)))
            for agent, reward in earned.items():
                rewards[agent] += float(reward)
        return rewards, True

    async def _chosen(
        self, env: Any, sandbox: Sandbox, table: Table, agent: Any, seen: tuple[Any, Mapping[str, Any]],
        turns: dict[Any, int],
    ) -> int:  # fmt: skip
        """The action an agent takes."""
        observation, info = seen
        legal = self._legal(agent, observation, info)
        first = self._first_action[agent]
        if len(legal) == 1:
            return first + legal[0]
        names = self.options.actions or tuple(str(first + action) for action in range(self._count[agent]))
        with sandbox.running(self.options.env):
            shown = self._shown(env, agent, observation, table.language)
        turn = await table[self._agents[agent]].act(shown, choices=[names[action] for action in legal], kind="move")
        action = first + legal[chosen(turn)]
        turns[agent] += 1
        return action

    def _legal(self, agent: Any, observation: Any, info: Mapping[str, Any]) -> list[int]:
        """Places of the actions that are not masked. Raises `ScenarioError` when none is left."""
        mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
        mask = info.get("action_mask") if mask is None else mask
        if mask is None:
            return list(range(self._count[agent]))
        flags = np.asarray(mask).reshape(-1)
        if len(flags) != self._count[agent] or not flags.any():
            raise ScenarioError(
                f"{self.options.env}: agent {agent!r} has a mask of {len(flags)} for {self._count[agent]} actions, "
                f"{int(flags.astype(bool).sum())} of them allowed"
            )
        return [int(action) for action in np.flatnonzero(flags)]

    def _shown(self, env: Any, agent: Any, observation: Any, language: str) -> Observation:
        told = str(self._render(observation, agent, env)) if self._render is not None else told_as_numbers(observation)
        who = PROMPTS[language]["player"].format(player=self._agents[agent])
        system, prefix = self.options.opening(language)
        return Observation(system=system, user=f"{who}\n{told.strip()}".strip(), prefix=prefix)

    def _started(self, sandbox: Sandbox, seed: int) -> tuple[Any, Any]:
        """A new environment and what its reset returned."""
        with sandbox.running(self.options.env):
            env = self._make(**self.options.env_options)
            return env, env.reset(seed=seed % 2**31)

    def _maker(self, package: Any) -> Callable[..., Any]:
        """What makes the environment. Raises `ConfigError`."""
        if ":" in self.options.env:
            found: Callable[..., Any] = attribute("env", self.options.env)
            return found
        registry = package.aec_registry if self.options.interface == "aec" else package.parallel_registry
        if self.options.env not in registry:
            raise ConfigError(
                f"PettingZoo's {self.options.interface} registry has no {self.options.env!r}"
                f'{nearest(self.options.env, registry)}; or name your own as "module:attr"'
            )
        return partial(package.make, self.options.interface, self.options.env)


def told_as_numbers(observation: Any) -> str:
    """An observation as text: numbers, rows of them, or the board its planes mark; parts of a dictionary one by one.

    Raises:
        ScenarioError: it has more than `MAX_NUMBERS` numbers, or is no array of numbers at all.
    """
    if isinstance(observation, Mapping):
        parts = {key: value for key, value in observation.items() if key != "action_mask"}
        if len(parts) == 1:
            return told_as_numbers(next(iter(parts.values())))
        return "\n".join(f"{key}: {told_as_numbers(value)}" for key, value in parts.items())
    if isinstance(observation, tuple | list):
        return "\n".join(map(told_as_numbers, observation))
    array = np.asarray(observation)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool) or array.size > MAX_NUMBERS:
        raise ScenarioError(
            f"an observation of shape {array.shape} and type {array.dtype} cannot be told in numbers; give "
            "scenario.options.render, a function (observation, agent, environment) -> text"
        )
    if array.ndim == 3 and array.shape[2] <= len(_CELLS) and _marks_cells(array):
        marks = np.where(array.any(axis=2), array.argmax(axis=2) + 1, 0)
        return "\n".join(" ".join("." if mark == 0 else _CELLS[mark - 1] for mark in row) for row in marks)
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    return "\n".join(" ".join(f"{value:.4g}" for value in row.astype(float)) for row in rows)


def _marks_cells(array: Any) -> bool:
    """Whether planes (rows, columns, planes) have zeros and ones only, and no cell is in two of them."""
    return bool(np.isin(array, (0, 1)).all() and (array.sum(axis=2) <= 1).all())
