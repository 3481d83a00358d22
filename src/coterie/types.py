"""The frozen data of the training loop.

    TrainingTask -> Scenario.play at a Table of Seats -> Episode (one Trajectory per seat, made of Turns)
    scores -> Mode -> rewards -> Credit -> advantages -> Learner -> a new AdapterVersion

Nothing here imports torch and nothing here has behaviour beyond derived properties. Token ids and
log-probabilities on a `Turn` are exactly those the engine sampled: they are never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

SeatId = str
ModelId = str
TeamId = str


class TaskType(StrEnum):
    """What kind of work a task is; decides its prompt and its checker."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"
    REASONING = "reasoning"
    OPTIMIZATION = "optimization"
    COLLABORATION = "collaboration"


class TrainingMode(StrEnum):
    """Who hears whom, and how a reward pool is divided (see `coterie.modes`)."""

    COOPERATIVE = "cooperative"
    COMPETITIVE = "competitive"
    TEAM_BATTLE = "team_battle"
    MIXED = "mixed"


class ModelRole(StrEnum):
    """What a model is in its group.

    A leader speaks first and its advice reaches its followers; followers answer after hearing it;
    teammates hear each other; a competitor shares nothing; a neutral model hears only what is public.
    """

    LEADER = "leader"
    FOLLOWER = "follower"
    COMPETITOR = "competitor"
    TEAMMATE = "teammate"
    NEUTRAL = "neutral"


class Tier(StrEnum):
    """Where a turn came from."""

    CAMEL = "camel"
    HTTP = "http"
    LOCAL = "local"
    SIMULATED = "simulated"
    SCRIPT = "script"
    HUMAN = "human"


class Split(StrEnum):
    """Which side of the train/held-out border a task stands on. The two never share content."""

    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """What is to be done and what it is worth.

    `content` belongs to the scenario that made the task (words, numbers, payoffs, the right answer). A task
    made by a user may leave it empty: the scenario then builds it from `task_type`, `difficulty` and `task_id`.
    """

    task_id: str
    task_type: TaskType
    difficulty: float = 0.5
    """0 (easiest) .. 1 (hardest)."""
    reward_pool: float = 1.0
    """Divided among the seats, never exceeded."""
    max_steps: int = 8
    """Most turns one seat may take in an episode."""
    required_models: int = 1
    """Seats at the table."""
    cooperation_level: float = 0.5
    """0 (pure competition) .. 1 (pure cooperation)."""
    content: Mapping[str, Any] = field(default_factory=dict)
    split: Split = Split.TRAIN

    def __post_init__(self) -> None:
        problems = []
        if not self.task_id:
            problems.append("task_id is empty")
        if not 0.0 <= self.difficulty <= 1.0:
            problems.append(f"difficulty {self.difficulty} is outside 0..1")
        if not 0.0 <= self.cooperation_level <= 1.0:
            problems.append(f"cooperation_level {self.cooperation_level} is outside 0..1")
        if not 0.0 < self.reward_pool < float("inf"):
            problems.append(f"reward_pool {self.reward_pool} must be positive and finite")
        if self.max_steps < 1:
            problems.append(f"max_steps {self.max_steps} must be at least 1")
        if self.required_models < 1:
            problems.append(f"required_models {self.required_models} must be at least 1")
        if problems:
            raise ValueError(f"task {self.task_id!r}: " + "; ".join(problems))
        object.__setattr__(self, "task_type", TaskType(self.task_type))
        object.__setattr__(self, "split", Split(self.split))


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a group goes about a task; derived from the task, the mode and who is present."""

    mode: TrainingMode
    teamwork: float
    """The task's cooperation_level."""
    communication: bool
    """Whether there is an advice turn at all (cooperation_level > 0.3)."""
    resource_sharing: bool
    """Whether the token budgets of those who hear each other are one pool (cooperation_level > 0.7)."""
    leadership: Literal["central", "delegated"]
    """Central: only leaders advise, and what a leader decides is its own answer. Delegated: each decides alone."""

    @staticmethod
    def of(task: TrainingTask, mode: TrainingMode, has_leader: bool) -> Strategy:
        """The strategy of `task` under `mode`; `has_leader` says whether any seat is held by a leader."""
        return Strategy(
            mode=mode,
            teamwork=task.cooperation_level,
            communication=task.cooperation_level > 0.3,
            resource_sharing=task.cooperation_level > 0.7,
            leadership="central" if has_leader else "delegated",
        )


@dataclass(frozen=True, slots=True, order=True)
class AdapterVersion:
    """One immutable state of one policy's adapter. Version 0 is the untrained adapter, equal to the base."""

    model_id: ModelId
    version: int

    @property
    def name(self) -> str:
        return f"{self.model_id}@v{self.version}"


# -- who sits where ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """A seat held by the current version of a model in training."""

    model_id: ModelId


@dataclass(frozen=True, slots=True)
class Frozen:
    """A seat held by a fixed adapter version (None: the bare base). Its turns are never trained on."""

    adapter: AdapterVersion | None


@dataclass(frozen=True, slots=True)
class Scripted:
    """A seat that plays by a rule: `name` is looked up in the scenario's `scripts`, or is "module:attr"."""

    name: str


@dataclass(frozen=True, slots=True)
class Person:
    """A seat a person takes at the terminal."""

    name: str = "you"


Player = Trained | Frozen | Scripted | Person


@dataclass(frozen=True, slots=True)
class Seat:
    """A role in a scenario, and who holds it (None until matchmaking has bound it)."""

    seat_id: SeatId
    player: Player | None = None
    symmetric_with: SeatId | None = None
    """Another seat with the same rules: permuting the two permutes the results."""


@dataclass(frozen=True, slots=True)
class PlayerCard:
    """What the table knows of the one who holds a seat; enough to write a prompt and to decide who hears whom."""

    seat_id: SeatId
    model_id: ModelId | None
    role: ModelRole = ModelRole.NEUTRAL
    team: TeamId | None = None
    specialization: str = ""


ADVICE = "advice"
"""Kind of a turn whose text reaches others and is not the speaker's own answer."""
DECISION = "decision"
"""Kind of a turn that is a leader's own answer and, at once, its advice."""


# -- what a seat is shown and what it says ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """What a seat is shown for one turn.

    `system` and `user` become chat messages under the base model's template; `prefix` opens the assistant's own
    message, so that choices can be short continuations of it (for example prefix "Answer:" and choice "red").
    """

    user: str
    system: str = ""
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. The same request with the same seed gives the same tokens whatever else is in the batch."""

    prompt_ids: tuple[int, ...]
    adapter: AdapterVersion | None
    """None: the bare base model."""
    seed: int
    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those at temperature 1."""
    choices: tuple[tuple[int, ...], ...] | None = None
    """Token ids of each allowed answer; decoding follows their trie. None: free text."""
    bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids before temperature, at every branching point (calibration)."""
    stop_ids: tuple[int, ...] = ()
    """Free text ends after one of these tokens."""
    distribution: bool = False
    """Also return the exact probability of every choice."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, text) pairs the prompt was rendered from, for engines behind a chat API; a last one of role "assistant" is
    the beginning of the answer."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine returns: token ids and the log-probabilities of the policy actually sampled from."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token, temperature, allowed set and bias included; 0.0 where only one token was allowed."""
    allowed: tuple[tuple[int, ...], ...] | None
    """For each token the ids it was chosen among; None: the whole vocabulary at every step."""
    entropy: tuple[float, ...]
    """Of the sampling distribution at each token, in nats."""
    adapter: AdapterVersion | None
    tier: Tier
    finish_reason: Literal["stop", "length", "choice"]
    choice: int | None = None
    choice_probs: tuple[float, ...] | None = None
    server: str = ""
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One act of one seat. Everything the learner needs stands on it."""

    seat_id: SeatId
    model_id: ModelId | None
    adapter: AdapterVersion | None
    kind: str
    """Label by the scenario: `ADVICE` and `DECISION` reach others; "answer", "move" and any other do not."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    allowed: tuple[tuple[int, ...], ...] | None
    bias: Mapping[int, float] | None
    temperature: float
    entropy: tuple[float, ...]
    text: str
    choice: int | None
    """Index of the choice taken, where choices were given."""
    valid: bool
    """Whether the answer was well formed: one of the choices, or free text that ended by itself."""
    tier: Tier
    server: str = ""
    latency_s: float = 0.0

    @property
    def trainable(self) -> bool:
        """Only turns sampled from a model in training, by a real engine, may reach a learner."""
        return self.model_id is not None and self.tier in (Tier.LOCAL, Tier.HTTP, Tier.CAMEL)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All turns of one seat in one episode."""

    seat_id: SeatId
    model_id: ModelId | None
    team: TeamId | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scenario says of a finished play. Scores and accuracies are in [0, 1]."""

    scores: Mapping[SeatId, float]
    """What each seat achieved, before the mode divides the reward pool."""
    accuracy: Mapping[SeatId, float] = field(default_factory=dict)
    """How right each seat was, where there is a right answer."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scenario-wide figures, for example {"cooperation": 1.0}."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One play of one task: a trajectory per seat, scores, and the rewards the mode made of them."""

    episode_id: str
    task: TrainingTask
    group: str
    """Episodes of one group played the same task from the same start; credit compares them."""
    trajectories: Mapping[SeatId, Trajectory]
    outcome: Outcome
    rewards: Mapping[SeatId, float]
    withheld: frozenset[SeatId] = frozenset()
    """Speakers whose advice was, at random, not delivered in this episode."""
    update: int = 0


@dataclass(frozen=True, slots=True)
class FailedEpisode:
    """An episode that raised; it is recorded and never trained on."""

    episode_id: str
    task: TrainingTask
    error: str


@dataclass(frozen=True, slots=True)
class Advantages:
    """One advantage per turn: `values[episode_id][seat_id]` has one number for each turn of that trajectory."""

    values: Mapping[str, Mapping[SeatId, tuple[float, ...]]]

    def of(self, episode_id: str, seat_id: SeatId, turn: int) -> float:
        return self.values[episode_id][seat_id][turn]
