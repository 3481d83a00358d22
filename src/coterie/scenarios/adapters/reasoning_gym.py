"""reasoning-gym: any of its procedural data sets as questions, judged by the data set's own scorer.

    (dataset, seed, index) -> an entry: question, answer, metadata -> asked of every seat -> score_answer in [0, 1]

A data set makes endless questions from a seed (Stojanovski et al., 2025). Training and held-out questions come from
different seeds; because small data sets repeat themselves whatever the seed, a question also stands on the held-out
side, or not, by a hash of its text (`heldout_share`), and the other side leaves it out. A task's content is seed and
index; the entry is made again from them, under global random states of its own, so that nothing of a run depends on
what else was drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from pydantic import Field

from coterie.errors import ConfigError, ScenarioError, nearest
from coterie.scenarios.adapters.foreign import Sandbox, load
from coterie.scenarios.jsonl_rows import Question, falls_heldout
from coterie.scenarios.questions import QuestionOptions, Questions
from coterie.types import Split, TaskType, TrainingTask, Turn

CHUNK: Final = 500
"""Questions made from one seed, as the package itself does: some data sets draw all of them at once."""
MAX_REJECTED: Final = 2000
"""Questions of the wrong side, or drawn before, in a row, after which a data set counts as exhausted."""


class ReasoningGymOptions(QuestionOptions):
    """Settings of a reasoning-gym data set."""

    dataset: str = "chain_sum"
    """Its name, as in reasoning_gym.create_dataset."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Its own settings, for example { min_terms = 2, max_terms = 2 }; not seed and size."""
    heldout_share: float = Field(default=0.2, gt=0, lt=1)
    """Expected share of all questions that stand on the held-out side."""
    heldout_tasks: int = Field(default=200, ge=1)
    """Held-out questions, at most; a small data set may have fewer."""
    suffix: str = ""
    """Added to every question, for example what form the answer is to have."""
    system: str | None = None
    """System prompt; None: a short one in the language of the run."""
    prefix: str | None = None
    """Opens the model's answer; None: "Answer:" in the language of the run."""
    max_tokens: int = Field(default=16, ge=1, le=4096)
    """Of an answer; also the token budget of each seat."""
    task_type: TaskType = TaskType.REASONING
    """Of each task; results are grouped by it."""
    difficulty: float = Field(default=0.5, ge=0, le=1)
    """Of each task; the data set's own settings decide how hard it is."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""


class ReasoningGym(Questions):
    """Questions of one data set: every seat answers in free text, and seats that may speak give advice first.

    Raises:
        ConfigError: the extra is missing, there is no such data set, or it refuses its settings.
    """

    Options = ReasoningGymOptions

    def __init__(self, options: ReasoningGymOptions) -> None:
        super().__init__(options)
        self.options = options
        load("reasoning_gym", extra="reasoning-gym", scenario="reasoning_gym")  # fills its factory
        self._factory = load("reasoning_gym.factory", extra="reasoning-gym", scenario="reasoning_gym")
        if options.dataset not in self._factory.DATASETS:
            raise ConfigError(
                f"reasoning-gym has no data set {options.dataset!r}{nearest(options.dataset, self._factory.DATASETS)}"
            )
        reserved = sorted({"seed", "size"} & set(options.config))
        if reserved:
            raise ConfigError(f"options.config.{reserved[0]} is set by the scenario, from the seed of the run")
        self._data_set = lru_cache(maxsize=8)(self._made)
        self._entry = lru_cache(maxsize=4096)(self._drawn)
        try:
            self._entry(0, 0)
        except ScenarioError as error:
            raise ConfigError(f"data set {options.dataset!r} with config {options.config}: {error}") from error

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Questions of one side. TRAIN is endless and may repeat a question; HELDOUT has each once.

        Raises:
            ScenarioError: the data set has no question for this side.
        """
        # seeds lie far apart, because many data sets number their questions by seed + index
        seeds = random.Random(f"reasoning_gym:{split}:{seed}")
        seen: set[str] = set()
        given = rejected = drawn = 0
        while split is Split.TRAIN or given < self.options.heldout_tasks:
            if drawn % CHUNK == 0:
                data_seed = seeds.getrandbits(31)
            task = self._task({"dataset": self.options.dataset, "seed": data_seed, "index": drawn % CHUNK}, split)
            drawn += 1
            question = self.question(task)
            wanted = falls_heldout(question, self.options.heldout_share) == (split is Split.HELDOUT)
            if not wanted or (split is Split.HELDOUT and question.prompt in seen):
                rejected += 1
                if rejected < MAX_REJECTED:
                    continue
                if split is Split.HELDOUT and given:
                    return
                raise ScenarioError(
                    f"none of {rejected} questions of {self.options.dataset!r} stands on the {split} side; change "
                    "heldout_share, or let the data set's config make more different questions"
                )
            seen.add(question.prompt)
            given, rejected = given + 1, 0
            yield task

    def question(self, task: TrainingTask) -> Question:
        """See `Questions.question`; a task without content asks a question made from its id."""
        entry = self._entry(*self._place(task))
        prompt = str(entry["question"]).strip() + self.options.suffix
        return Question(
            prompt=prompt,
            answer=_shown(entry["answer"]),
            system=self.options.system,
            prefix=self.options.prefix,
            max_tokens=self.options.max_tokens,
        )

    def accuracy(self, task: TrainingTask, question: Question, turn: Turn) -> float:
        """What the data set's own scorer says. Raises `ScenarioError` when that is no share."""
        seed, index = self._place(task)
        with Sandbox(seed).running(f"scoring {self.options.dataset}"):
            score = float(self._data_set(seed).score_answer(turn.text.strip(), self._entry(seed, index)))
        if not (math.isfinite(score) and -1e-9 <= score <= 1 + 1e-9):
            raise ScenarioError(f"data set {self.options.dataset!r} scored {turn.text!r} with {score}, outside 0..1")
        return min(1.0, max(0.0, score))

    def _task(self, content: Mapping[str, Any], split: Split) -> TrainingTask:
        return TrainingTask(
            task_id=f"{content['dataset']}-{content['seed']}-{content['index']}",
            task_type=self.options.task_type,
            difficulty=self.options.difficulty,
            reward_pool=self.options.reward_pool,
            max_steps=2,
            required_models=self.options.required_models,
            cooperation_level=self.options.cooperation_level,
            content=content,
            split=split,
        )

    def _place(self, task: TrainingTask) -> tuple[int, int]:
        """Seed and index of a task's entry. Raises `ScenarioError` for content that is of something else."""
        if not task.content:
            return random.Random(task.task_id).getrandbits(31), 0
        seed, index = task.content.get("seed"), task.content.get("index")
        whole = isinstance(seed, int) and isinstance(index, int) and seed >= 0 and 0 <= index < CHUNK
        if task.content.get("dataset") != self.options.dataset or not whole:
            raise ScenarioError(
                f"task {task.task_id!r}: content must be {{dataset = {self.options.dataset!r}, seed = a whole number, "
                f"index = a whole number below {CHUNK}}} or empty, got {dict(task.content)}"
            )
        return int(task.content["seed"]), int(task.content["index"])

    def _made(self, seed: int) -> Any:
        return self._factory.create_dataset(self.options.dataset, **self.options.config, seed=seed, size=CHUNK)

    def _drawn(self, seed: int, index: int) -> dict[str, Any]:
        with Sandbox(seed + index).running(self.options.dataset):
            entry: dict[str, Any] = self._data_set(seed)[index]
        return entry


def _shown(answer: object) -> str:
    """A reference answer as text; some data sets have none, and their scorer judges by the entry alone."""
    return str(answer).strip() or "-" if answer is not None else "-"
