"""A user's own tasks, from a file with one JSON object a line.

    {"prompt": "Capital of France?", "answer": "Paris"}
    {"prompt": "Which is a fruit?", "choices": ["pear", "brick"], "answer": "pear", "cooperation_level": 0.9}

    advice (who speaks: see `teamwork`) -> every seat answers -> accuracy * efficiency

Every row is checked when the scenario is built; a bad row is an error with its line, and nothing is skipped. Training
and held-out rows never ask the same question: they come from two files, or from one that is split by a hash of the
question. The keys of a row are described at `jsonl_rows.Question` and `jsonl_rows.Row`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError, model_validator

from coterie.config import explain
from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import ScenarioOptions, Table
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
from coterie.scenarios.teamwork import advice_speakers, heard_by, response_quality, team_scores
from coterie.types import ADVICE, Observation, Outcome, Seat, SeatId, Split, TrainingTask, Turn

ADVICE_TOKENS: Final = 24
"""Most tokens of free-text advice; with choices, advice is one of them."""

_PROMPTS: Final = {
    "en": {
        "system": "Answer in few words.",
        "prefix": "Answer:",
        "choices": "Choices: ",
        "and": ", ",
        "advise": "Give your partners a short hint.",
        "advice prefix": "Advice:",
        "heard": "Advice from {speaker}: {text}",
    },
    "zh": {
        "system": "请简短作答。",
        "prefix": "答案：",
        "choices": "选项：",
        "and": "、",
        "advise": "给伙伴一条简短的建议。",
        "advice prefix": "建议：",
        "heard": "{speaker}的建议：{text}",
    },
}


class JsonLinesOptions(ScenarioOptions):
    """Settings of a file of tasks."""

    path: Path
    """JSON Lines file of the training rows."""
    heldout_path: Path | None = None
    """File of the held-out rows; None: a share of the rows of `path` is held out."""
    heldout_share: float = Field(default=0.2, ge=0, lt=1)
    """Expected share of the questions held out, where there is no `heldout_path`; 0: none."""
    scorer: Literal["exact", "number", "contains"] = "exact"
    """When free text is right. exact: it is the answer, whatever the case and spacing. number: its last number is the
    answer, within 1e-6. contains: the answer stands in it, whatever the case and spacing."""
    show_choices: bool = True
    """Whether the choices are listed after the prompt; switch off where your prompts name them."""
    required_models: int = Field(default=1, ge=1)
    """Models that answer, for rows that do not say."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """For rows that do not say."""

    @model_validator(mode="after")
    def _fits(self) -> JsonLinesOptions:
        if self.heldout_path is not None and "heldout_share" in self.model_fields_set:
            raise ValueError("give either heldout_path or heldout_share, not both")
        return self


class JsonLines:
    """Every seat answers the question; seats that may speak give advice first. All seats have the same rules.

    Scores: 1 or 0 for right or wrong, times efficiency: the share of its token allowance (`max_tokens` for the answer,
    and as much as advice may have) a seat left unused; allowances are pooled where the strategy shares resources.

    Metrics: ``accuracy``, mean over seats; ``response_quality``, mean keyword bonus of the answers.

    Raises:
        ConfigError: a file cannot be read or has bad rows (all are listed), or one side of the split is empty.
    """

    Options = JsonLinesOptions

    def __init__(self, options: JsonLinesOptions) -> None:
        self.options = options
        problems = Problems()
        rows = read_rows(options.path, problems)
        if options.heldout_path is None:
            sides = [Split.HELDOUT if falls_heldout(r.row, options.heldout_share) else Split.TRAIN for r in rows]
            named = [(_task_id(located, "line"), located) for located in rows]
        else:
            others = read_rows(options.heldout_path, problems)
            check_disjoint(rows, others, problems)
            sides = [Split.TRAIN] * len(rows) + [Split.HELDOUT] * len(others)
            named = [(_task_id(located, "line"), located) for located in rows]
            named += [(_task_id(located, "heldout-line"), located) for located in others]
        check_task_ids(named, problems)
        if options.scorer == "number":
            for _, located in named:
                if located.row.choices is None and last_number(located.row.answer) is None:
                    problems.add(located.place, f"answer {located.row.answer!r} has no number for scorer 'number'")
        problems.check()
        heldout = sides.count(Split.HELDOUT)
        if heldout == len(sides) or (heldout == 0 and options.heldout_share > 0):
            raise ConfigError(
                f"{options.path}: with heldout_share {options.heldout_share:g}, {heldout} of {len(sides)} rows are "
                "held out, which leaves one side empty; add rows, change heldout_share, or give heldout_path"
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

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [
            Seat(f"seat_{number}", symmetric_with=None if number == 1 else "seat_1")
            for number in range(1, task.required_models + 1)
        ]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is no question, or none and no row of that id."""
        self._question(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        question = self._question(task)
        speakers = advice_speakers(table)
        said = await asyncio.gather(*(self._advise(question, table, seat) for seat in speakers))
        advice = {seat: text for seat, turn in zip(speakers, said, strict=True) if (text := _text(question, turn))}
        answers = await asyncio.gather(*(self._answer(question, table, seat, advice) for seat in table.seats))
        accuracy = {seat: float(self._right(question, turn)) for seat, turn in zip(table.seats, answers, strict=True)}
        tokens = {seat: len(turn.token_ids) for seat, turn in zip(table.seats, answers, strict=True)}
        budget = dict.fromkeys(table.seats, question.max_tokens)
        for seat, turn in zip(speakers, said, strict=True):
            tokens[seat] += len(turn.token_ids)
            budget[seat] += _advice_allowance(question)
        return Outcome(
            scores=team_scores(table, accuracy, tokens, budget),
            accuracy=accuracy,
            metrics={
                "accuracy": sum(accuracy.values()) / len(accuracy),
                "response_quality": sum(response_quality(turn.text) for turn in answers) / len(answers),
            },
        )

    async def _advise(self, question: Question, table: Table, speaker: SeatId) -> Turn:
        text = _PROMPTS[table.language]
        seen = self._shown(question, table.language, text["advise"], prefix=text["advice prefix"])
        return await table[speaker].act(
            seen,
            choices=question.choices,
            max_tokens=_advice_allowance(question),
            kind=ADVICE,
        )

    async def _answer(self, question: Question, table: Table, seat: SeatId, advice: Mapping[SeatId, str]) -> Turn:
        text = _PROMPTS[table.language]
        heard = [text["heard"].format(speaker=speaker, text=said) for speaker, said in heard_by(table, seat, advice)]
        prefix = text["prefix"] if question.prefix is None else question.prefix
        return await table[seat].act(
            self._shown(question, table.language, *heard, prefix=prefix),
            choices=question.choices,
            max_tokens=question.max_tokens,
            kind="answer",
        )

    def _shown(self, question: Question, language: str, *more: str, prefix: str) -> Observation:
        """The question first, so that all turns of an episode share that part of the prompt."""
        text = _PROMPTS[language]
        lines = [question.prompt]
        if question.choices is not None and self.options.show_choices:
            lines.append(text["choices"] + text["and"].join(question.choices))
        system = text["system"] if question.system is None else question.system
        return Observation(system=system, user="\n".join([*lines, *more]), prefix=prefix)

    def _right(self, question: Question, turn: Turn) -> bool:
        if question.choices is None:
            return SCORERS[self.options.scorer](turn.text, question.answer)
        return turn.choice is not None and question.choices[turn.choice] == question.answer

    def _question(self, task: TrainingTask) -> Question:
        if not task.content:
            if task.task_id not in self._questions:
                raise ScenarioError(
                    f"task {task.task_id!r} has no content and is no row of {self.options.path}; give it content with "
                    "prompt and answer, or the task_id of a row"
                )
            return self._questions[task.task_id]
        try:
            return Question.model_validate(dict(task.content))
        except ValidationError as error:
            raise ScenarioError(f"task {task.task_id!r}, content: {explain(error, Question)}") from error


def _task_id(located: Located, kind: str) -> str:
    return located.row.task_id or f"{kind}-{located.line}"


def _advice_allowance(question: Question) -> int:
    return ADVICE_TOKENS if question.choices is None else question.max_tokens


def _text(question: Question, turn: Turn) -> str:
    """What a turn says to others; "" if nothing."""
    if question.choices is None:
        return " ".join(turn.text.split())
    return "" if turn.choice is None else question.choices[turn.choice]
