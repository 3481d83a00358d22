"""What a scenario is: rules that read top to bottom as one async function, and what it may ask of a table.

    class Greeting:
        Options = MyOptions                                  # a pydantic model; unknown options are refused
        def __init__(self, options: MyOptions) -> None: ...
        def tasks(self, split, seed): yield TrainingTask(...)     # endless for "train", finite for "heldout"
        def seats(self, task): return [Seat("host"), Seat("guest")]
        async def play(self, task, table):
            turn = await table["host"].act(Observation(user="Say hello."), choices=("hello", "goodbye"))
            return Outcome(scores={"host": float(turn.choice == 0), "guest": 0.0})

All randomness comes from `table.rng` (seeded per episode) and the seed given to `tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from coterie.config import explain
from coterie.errors import ConfigError, CoterieError, ScenarioError, cause
from coterie.registry import resolve
from coterie.types import Observation, Outcome, PlayerCard, Seat, SeatId, Split, Strategy, TrainingTask, Turn

Script = Callable[[Observation, Sequence[str], random.Random], str]
"""A scripted player: (observation, choices, rng) -> the text it answers."""


class ScenarioOptions(BaseModel):
    """Base of a scenario's own settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def at_random(observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """The script that takes any choice."""
    return rng.choice(choices)


def repeated(task: TrainingTask) -> Iterator[TrainingTask]:
    """The tasks of a scenario that has only this one: endlessly for TRAIN, once for HELDOUT."""
    yield task
    while task.split is Split.TRAIN:
        yield task


class SeatHandle(Protocol):
    """One seat, as a scenario asks it for turns."""

    card: PlayerCard

    async def act(
        self,
        observation: Observation,
        *,
        choices: Sequence[str] | None = None,
        max_tokens: int = 16,
        kind: str = "answer",
    ) -> Turn:
        """Ask for one turn. With `choices`, the answer is one of them (`turn.choice` is its index); without,
        it is free text of at most `max_tokens` tokens. Raises `ScenarioError` past `task.max_steps` turns."""
        ...

    async def distribution(self, observation: Observation, choices: Sequence[str]) -> tuple[float, ...]:
        """The exact probability of each choice; no turn is taken. For exact evaluation."""
        ...


class Table(Protocol):
    """Where one episode is played."""

    task: TrainingTask
    strategy: Strategy
    language: str
    """Of the prompts: "en" or "zh"."""
    seats: tuple[SeatId, ...]

    @property
    def rng(self) -> random.Random: ...

    def __getitem__(self, seat_id: SeatId) -> SeatHandle: ...

    def hears(self, listener: SeatId, speaker: SeatId) -> bool:
        """Whether mode and roles let advice of `speaker` reach `listener`."""
        ...

    def delivers(self, speaker: SeatId) -> bool:
        """False when this speaker's advice is withheld in this episode, drawn at random to measure its worth."""
        ...


class Scenario(Protocol):
    """The rules: which tasks, which seats, and how one is played."""

    Options: ClassVar[type[ScenarioOptions]]

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Tasks of one side of the train/held-out border; the same seed gives the same tasks.

        TRAIN never ends. HELDOUT may end. No content of one side appears on the other, unless the scenario has
        only one task (a matrix game), which its docstring then says.
        """
        ...

    def seats(self, task: TrainingTask) -> Sequence[Seat]: ...

    async def play(self, task: TrainingTask, table: Table) -> Outcome: ...


@runtime_checkable
class ExactlyMeasured(Protocol):
    """A scenario that can compute its metrics exactly from the policies, without sampling."""

    async def exact(self, table: Table) -> Mapping[str, float]: ...


@runtime_checkable
class SingleTask(Protocol):
    """A scenario may say that its training and held-out tasks share their content (a matrix game has only one)."""

    single_task: bool


def shares_tasks(scenario: Scenario) -> bool:
    """Whether what is played held out was trained on too, and says nothing of new tasks."""
    return isinstance(scenario, SingleTask) and scenario.single_task


@runtime_checkable
class ChecksTasks(Protocol):
    """A scenario that can say of a user's task, before it is played, whether it can be."""

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` naming the task, what is wrong with its content, and what is expected."""
        ...


@runtime_checkable
class HasScripts(Protocol):
    """A scenario that ships scripted players."""

    scripts: Mapping[str, Script]


SCENARIOS = {
    "tasks": "coterie.scenarios.tasks:Tasks",
    "jsonl": "coterie.scenarios.jsonl:JsonLines",
    "signaling": "coterie.scenarios.signaling:Signaling",
    "matrix": "coterie.scenarios.matrix:Matrix",
    "kuhn": "coterie.scenarios.poker:Kuhn",
    "leduc": "coterie.scenarios.poker:Leduc",
    "tictactoe": "coterie.scenarios.tictactoe:TicTacToe",
    "textarena": "coterie.scenarios.adapters.textarena:TextArena",
    "pettingzoo": "coterie.scenarios.adapters.pettingzoo:PettingZoo",
    "openspiel": "coterie.scenarios.adapters.openspiel:OpenSpiel",
    "reasoning_gym": "coterie.scenarios.adapters.reasoning_gym:ReasoningGym",
    "datasets": "coterie.scenarios.adapters.datasets:Datasets",
    "oasis": "coterie.scenarios.adapters.oasis:Oasis",
    "public_goods": "coterie.scenarios.public_goods:PublicGoods",
    "commons": "coterie.scenarios.commons:Commons",
    "blotto": "coterie.scenarios.blotto:Blotto",
    "team_blotto": "coterie.scenarios.team_blotto:TeamBlotto",
    "team_signaling": "coterie.scenarios.team_signaling:TeamSignaling",
    "guess_number": "coterie.scenarios.guess_number:GuessNumber",
    "taboo": "coterie.scenarios.taboo:Taboo",
    "bargaining": "coterie.scenarios.bargaining:Bargaining",
}


def draw_tasks(scenario: Scenario, split: Split, seed: int) -> Iterator[TrainingTask]:
    """`scenario.tasks`, with whatever it does wrong said as a `ScenarioError`."""
    try:
        for task in scenario.tasks(split, seed):
            if not isinstance(task, TrainingTask):
                raise ScenarioError(f"tasks({split}) gave {task!r}; give TrainingTask(…)s")
            yield task
    except CoterieError:
        raise
    except Exception as error:
        raise ScenarioError(f"tasks({split}) raised {cause(error)}") from error


def first_tasks(scenario: Scenario, seed: int, count: int = 1000) -> list[TrainingTask]:
    """The first `count` tasks of each side. Raises `ScenarioError` when there is nothing to train on."""
    train, heldout = (list(islice(draw_tasks(scenario, split, seed), count)) for split in Split)
    if not train:
        raise ScenarioError("the scenario gives no training task")
    return [*train, *heldout]


def heldout_task(scenario: Scenario, seed: int, index: int) -> TrainingTask:
    """Held-out task number `index`. Raises `ConfigError` when there are not as many."""
    for task in islice(draw_tasks(scenario, Split.HELDOUT, seed), index, index + 1):
        return task
    raise ConfigError(f"there is no held-out task number {index}; they start at 0 and end before it")


def build_scenario(name: str, options: Mapping[str, object]) -> Scenario:
    """Find a scenario and give it its options.

    Raises:
        ConfigError: unknown scenario, unknown option (with the nearest valid one), impossible value.
    """
    scenario = resolve("scenario", name, SCENARIOS)
    try:
        built: Scenario = scenario(scenario.Options.model_validate(dict(options)))
    except ValidationError as error:
        raise ConfigError(f"scenario {name!r}, options: {explain(error, scenario.Options)}") from error
    return built
