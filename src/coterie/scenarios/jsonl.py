"""A user's own tasks, from a file with one JSON object a line.

    {"prompt": "Capital of France?", "answer": "Paris"}
    {"prompt": "Which is a fruit?", "choices": ["pear", "brick"], "answer": "pear", "cooperation_level": 0.9}

Every row is checked when the scenario is built; a bad row is an error with its line, and nothing is skipped. Training
and held-out rows never ask the same question: they come from two files, or from one that is split by a hash of the
question. The keys of a row are described at `jsonl_rows.Question` and `jsonl_rows.Row`; how a question is played, at
`questions.Questions`. `Rows` does the same for rows from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from coterie.config import explain
from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.jsonl_rows import (
    SCORERS,
    Located,
    Problems,
    Question,
    check_disjoint,
    check_task_ids,
    falls_heldout,
    last_number,
    read_rows,
)
from coterie.scenarios.questions import QuestionOptions, Questions
from coterie.types import Split, TrainingTask, Turn


class RowOptions(QuestionOptions):
    """Settings of scenarios whose questions are rows."""

    heldout_share: float = Field(default=0.2, ge=0, lt=1)
    """Expected share of the questions held out, where held-out rows have no source of their own; 0: none."""
    scorer: Literal["exact", "number", "contains"] = "exact"
    """When free text is right. exact: it is the answer, whatever the case and spacing. number: its last number is the
    answer, within 1e-6. contains: the answer stands in it, whatever the case and spacing."""


class JsonLinesOptions(RowOptions):
    """Settings of a file of tasks."""

    path: Path
    """JSON Lines file of the training rows."""
    heldout_path: Path | None = None
    """File of the held-out rows; None: a share of the rows of `path` is held out."""

    @model_validator(mode="after")
    def _fits(self) -> JsonLinesOptions:
        if self.heldout_path is not None and "heldout_share" in self.model_fields_set:
            raise ValueError("give either heldout_path or heldout_share, not both")
        return self


class Rows(Questions):
    """Questions that are rows, checked together and split for good."""

    def __init__(
        self,
        options: RowOptions,
        problems: Problems,
        rows: Sequence[Located],
        heldout: Sequence[Located] | None,
        unit: str,
    ) -> None:
        """
        Args:
            problems: found while reading; what is found here is added, and all are reported.
            heldout: rows of the held-out side; None: a share of `rows` is held out.
            unit: what a row's number counts, for task ids: "line-7".

        Raises:
            ConfigError: there are problems, or one side of the split is empty.
        """
        super().__init__(options)
        self._scorer = options.scorer
        if heldout is None:
            sides = [Split.HELDOUT if falls_heldout(r.row, options.heldout_share) else Split.TRAIN for r in rows]
            named = [(_task_id(located, unit), located) for located in rows]
        else:
            check_disjoint(rows, heldout, problems)
            sides = [Split.TRAIN] * len(rows) + [Split.HELDOUT] * len(heldout)
            named = [(_task_id(located, unit), located) for located in rows]
            named += [(_task_id(located, f"heldout-{unit}"), located) for located in heldout]
        check_task_ids(named, problems)
        if options.scorer == "number":
            for _, located in named:
                if located.row.choices is None and last_number(located.row.answer) is None:
                    problems.add(located.place, f"answer {located.row.answer!r} has no number for scorer 'number'")
        problems.check()
        self._source = rows[0].source
        count = sides.count(Split.HELDOUT)
        if count == len(sides) or (count == 0 and options.heldout_share > 0):
            raise ConfigError(
                f"{self._source}: with heldout_share {options.heldout_share:g}, {count} of {len(sides)} rows are held "
                "out, which leaves one side empty; add rows, change heldout_share, or give held-out rows of their own"
            )
        self._questions: dict[str, Question] = {task_id: located.row for task_id, located in named}
        self._tasks: dict[Split, list[TrainingTask]] = {split: [] for split in Split}
        for split, (task_id, located) in zip(sides, named, strict=True):
            task = located.row.task(task_id, split, options.required_models, options.cooperation_level)
            self._tasks[split].append(task)

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every row of one side once, in an order drawn from `seed`; for TRAIN again and again, each time reordered."""
        rng = random.Random(f"jsonl:{split}:{seed}")
        tasks = self._tasks[split]
        while True:
            yield from rng.sample(tasks, len(tasks))
            if split is Split.HELDOUT:
                return

    def question(self, task: TrainingTask) -> Question:
        """See `Questions.question`; a task without content is the row of its id."""
        if not task.content:
            if task.task_id not in self._questions:
                raise ScenarioError(
                    f"task {task.task_id!r} has no content and is no row of {self._source}; give it content with "
                    "prompt and answer, or the task_id of a row"
                )
            return self._questions[task.task_id]
        try:
            return Question.model_validate(dict(task.content))
        except ValidationError as error:
            raise ScenarioError(f"task {task.task_id!r}, content: {explain(error, Question)}") from error

    def accuracy(self, task: TrainingTask, question: Question, turn: Turn) -> float:
        """1 or 0 for right or wrong."""
        if question.choices is None:
            return float(SCORERS[self._scorer](turn.text, question.answer))
        return float(turn.choice is not None and question.choices[turn.choice] == question.answer)


class JsonLines(Rows):
    """Questions from a file: every seat answers, and seats that may speak give advice first.

    Raises:
        ConfigError: a file cannot be read or has bad rows (all are listed), or one side of the split is empty.
    """

    Options = JsonLinesOptions

    def __init__(self, options: JsonLinesOptions) -> None:
        self.options = options
        problems = Problems()
        rows = read_rows(options.path, problems)
        heldout = None if options.heldout_path is None else read_rows(options.heldout_path, problems)
        super().__init__(options, problems, rows, heldout, "line")


def _task_id(located: Located, unit: str) -> str:
    return located.row.task_id or f"{unit}-{located.line}"
