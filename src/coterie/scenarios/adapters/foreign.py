"""What all adapters share: other people's packages, kept from the network and from everybody's random numbers.

    package = load("textarena", extra="textarena", scenario="textarena")     # or an error that names the extra
    with sandbox.running("TicTacToe-v0"):                                    # every call of foreign code
        env.step(action)

Games of other packages draw from the global generators of `random` and `numpy`, and some fetch word lists when they
are imported. Many episodes run in one process, interleaved at every turn. So every episode has a `Sandbox` with global
states of its own, seeded by the task; they are in place only while its foreign code runs, and whatever stood there
before is put back. Meanwhile this thread cannot reach the network: an attempt fails as if there were none, and is
named if the package then fails.

Invariants: outside `running`, the global generators and the network are as they were; the same seed and the same
calls give the same numbers however episodes interleave. Foreign code that starts threads or processes of its own is
not kept from anything in those.
"""

from __future__ import annotations

import importlib
import io
import math
import random
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final

import numpy as np
from pydantic import Field, model_validator

from coterie.errors import ConfigError, CoterieError, MissingPackageError, ScenarioError
from coterie.scenarios.base import ScenarioOptions
from coterie.types import SeatId, Split, TaskType, TrainingTask

_PATCHING = threading.RLock()
"""Held while foreign code runs: the global generators and the socket module are in one episode's hands at a time."""

PROMPTS: Final[Mapping[str, Mapping[str, str]]] = {
    "en": {"system": "Choose a move.", "prefix": "Move:", "player": "You are {player}."},
    "zh": {"system": "选择一步。", "prefix": "走法：", "player": "你是{player}。"},
}
"""What is said around a game's own text, which stays in the game's language."""


class GameOptions(ScenarioOptions):
    """Settings that scenarios of other packages' games have in common."""

    reward_range: tuple[float, float] | None = None
    """Least and greatest reward of one player in a whole game; the score is where its reward lies between them. None:
    -1 to 1, or, where the game says its own, that."""
    max_turns: int = Field(default=30, ge=1)
    """Most turns of one seat; a game that is not over by then ends with what each has earned."""
    system: str | None = None
    """System prompt; None: a short one in the language of the run."""
    prefix: str | None = None
    """Opens the model's answer; None: "Move:" in the language of the run."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @model_validator(mode="after")
    def _ordered(self) -> GameOptions:
        low, high = self.reward_range or (-1.0, 1.0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"reward_range is [{low:g}, {high:g}]; give the least and the greatest reward, both finite"
            )
        return self

    def opening(self, language: str) -> tuple[str, str]:
        """System prompt and prefix."""
        text = PROMPTS[language]
        return (
            text["system"] if self.system is None else self.system,
            text["prefix"] if self.prefix is None else self.prefix,
        )


class Sandbox:
    """One episode's global random states, and a thread without a network while its foreign code runs."""

    def __init__(self, seed: int) -> None:
        """`seed`: of the states; any integer."""
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        self._refused: list[str] = []

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Foreign code may run inside, and nothing may be awaited there.

        Raises:
            ScenarioError: the code raised anything but a `CoterieError`; says `what`, the cause, and whether it was
                refused the network.
        """
        with _PATCHING:
            python, numpy = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                with _offline(self._refused):
                    yield
            except CoterieError:
                raise
            except Exception as error:
                raise ScenarioError(f"{what}: {type(error).__name__}: {error}{self._hint()}") from error
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(python)
                np.random.set_state(numpy)

    def _hint(self) -> str:
        if not self._refused:
            return ""
        return (
            f" (it wanted to reach {self._refused[0]}, and there is no network in an episode; fetch the data it needs "
            "beforehand, or choose another environment)"
        )


@contextmanager
def _offline(refused: list[str]) -> Iterator[None]:
    """Name look-ups and connections of this thread fail like without a network; each is noted in `refused`."""
    here = threading.get_ident()
    look_up, own = socket.getaddrinfo, dict(vars(socket.socket))

    def refuse(target: object) -> OSError:
        refused.append(str(target))
        return OSError(f"no network here: {target} was not reached")

    def no_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            raise refuse(host)
        return look_up(host, *args, **kwargs)

    def kept(name: str) -> Any:
        connect = getattr(socket.socket, name)

        def no_connection(self: socket.socket, address: Any) -> Any:
            if threading.get_ident() == here:
                raise refuse(address)
            return connect(self, address)

        return no_connection

    methods = {name: kept(name) for name in ("connect", "connect_ex")}
    socket.getaddrinfo = no_look_up
    for name, method in methods.items():
        setattr(socket.socket, name, method)
    try:
        yield
    finally:
        socket.getaddrinfo = look_up
        for name in methods:
            if name in own:
                setattr(socket.socket, name, own[name])
            else:
                delattr(socket.socket, name)  # it was inherited


def load(module: str, *, extra: str, scenario: str, package: str | None = None) -> Any:
    """Import a module of an extra, without network and without what it prints.

    Args:
        extra: of Coterie, which installs it.
        scenario: that asks, for the message.
        package: top-level module that the extra brings; None: the first part of `module`.

    Raises:
        MissingPackageError: the package, or one it needs, is missing.
        ConfigError: it is there and cannot be imported.
    """
    top = package or module.partition(".")[0]
    try:
        with Sandbox(0).running(f"importing {module}"), redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ScenarioError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == top:
            raise MissingPackageError(
                f"scenario {scenario!r} needs the package {top}; pip install 'coterie[{extra}]'"
            ) from error
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").startswith(f"{top}."):
            raise ConfigError(f"scenario {scenario!r}: {top} has no module {cause.name!r}; check its name") from error
        if isinstance(cause, ModuleNotFoundError):
            raise MissingPackageError(
                f"scenario {scenario!r}: {module} needs {cause.name!r}, which is not installed; install what {top} "
                f"says this environment needs, or pip install 'coterie[{extra}]'"
            ) from error
        raise ConfigError(
            f"scenario {scenario!r}: cannot import {module}: {error}; pip install -U 'coterie[{extra}]'"
        ) from error


def attribute(kind: str, name: str) -> Any:
    """The object "module:attr" names, for a function of the user's.

    Raises:
        ConfigError: it is not of that form, does not import, or has no such attribute.
    """
    module, colon, attr = name.partition(":")
    if not (module and colon and attr):
        raise ConfigError(f'{kind} {name!r}: write it as "module:attr"')
    try:
        with Sandbox(0).running(f"importing {module}"):
            return getattr(importlib.import_module(module), attr)
    except ScenarioError as error:
        if not isinstance(error.__cause__, AttributeError):
            raise ConfigError(f"{kind} {name!r}: cannot import {module!r}: {error.__cause__}") from error
        raise ConfigError(f"{kind} {name!r}: module {module!r} has no {attr!r}") from error


def game_tasks(
    scenario: str, game: str, players: int, options: GameOptions, split: Split, seed: int
) -> Iterator[TrainingTask]:
    """Endless tasks, each one start of the game: cards, dice and whatever else it draws come from `game_seed`.

    Training has the even seeds and held-out play the odd ones. Episodes of one task are dealt alike, so that credit
    compares like with like. A game without chance is the same from every seed.
    """
    rng = random.Random(f"{scenario}:{split}:{seed}")
    while True:
        game_seed = 2 * rng.getrandbits(30) + (split is Split.HELDOUT)
        yield TrainingTask(
            task_id=f"{game}-{game_seed}",
            task_type=TaskType.COLLABORATION,
            reward_pool=options.reward_pool,
            max_steps=options.max_turns,
            required_models=players,
            cooperation_level=options.cooperation_level,
            content={"game": game, "game_seed": game_seed},
            split=split,
        )


def game_seed(task: TrainingTask, game: str) -> int:
    """The seed of a task's start; of a user's task without content, one made from its id.

    Raises:
        ScenarioError: its content is of another game or has no whole number as `game_seed`.
    """
    if not task.content:
        return random.Random(task.task_id).getrandbits(31)
    seed = task.content.get("game_seed")
    if task.content.get("game") != game or not isinstance(seed, int) or isinstance(seed, bool):
        raise ScenarioError(
            f"task {task.task_id!r}: content must be {{game = {game!r}, game_seed = a whole number}} or empty, "
            f"got {dict(task.content)}"
        )
    return seed


def scored(rewards: Mapping[SeatId, float], reward_range: tuple[float, float]) -> dict[SeatId, float]:
    """Rewards moved to [0, 1] by their range.

    Raises:
        ScenarioError: a reward is no finite number, or lies outside the range.
    """
    low, high = reward_range
    scores = {}
    for seat, reward in rewards.items():
        if not (math.isfinite(reward) and low - 1e-9 <= reward <= high + 1e-9):
            raise ScenarioError(
                f"the game gave {seat!r} a reward of {reward:g}, outside reward_range [{low:g}, {high:g}]; set "
                "scenario.options.reward_range to the least and the greatest reward of a whole game"
            )
        scores[seat] = min(1.0, max(0.0, (reward - low) / (high - low)))
    return scores


def distinct(texts: Sequence[str]) -> bool:
    """Whether texts can be choices: all different, none blank, none with white space around it."""
    return len(set(texts)) == len(texts) and all(text and text == text.strip() for text in texts)
