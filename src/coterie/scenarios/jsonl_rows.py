"""A file of tasks, one JSON object a line, read whole and checked before anything is played.

    bytes -> lines -> Row (checked) -> TrainingTask

Nothing is skipped: a bad line is an error with its file and number, and all bad lines are reported together. Equal
questions are equal in system prompt, prompt and choices, whatever their case, spacing and order of choices.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.config import explain
from coterie.errors import ConfigError
from coterie.types import Split, TaskType, TrainingTask

MAX_REPORTED: Final = 20
"""Bad rows shown one by one; the rest are counted."""

_NUMBER: Final = re.compile(
    r"(?:(?<![\w.])[-+−])?"  # a sign, but not the minus of "5-2"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,234.5  1234.5  .5
    r"(?:[eE][-+]?\d+)?"
)


class Question(BaseModel):
    """What is asked and what is right: `TrainingTask.content` of this scenario."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    """What every seat is asked, word for word."""
    answer: str = Field(min_length=1)
    """The right answer; with `choices`, one of them."""
    choices: tuple[str, ...] | None = Field(default=None, strict=False)
    """The answers allowed; None: free text, judged by the scenario's scorer."""
    system: str | None = None
    """System prompt; None: a short one in the language of the run."""
    prefix: str | None = None
    """Opens the model's answer; None: "Answer:" in the language of the run."""
    max_tokens: int = Field(default=16, ge=1, le=4096)
    """Of an answer; also the token budget of each seat."""

    @model_validator(mode="after")
    def _fits(self) -> Question:
        if not self.prompt.strip():
            raise ValueError("prompt is blank")
        if not self.answer.strip():
            raise ValueError("answer is blank")
        if self.choices is None:
            return self
        if len(self.choices) < 2:
            raise ValueError(f"choices has {len(self.choices)} entries; give at least two, or leave choices out")
        if any(not choice or choice != choice.strip() for choice in self.choices):
            raise ValueError("choices must not be empty or begin or end with white space")
        doubled = sorted({choice for choice in self.choices if self.choices.count(choice) > 1})
        if doubled:
            raise ValueError(f"choice {doubled[0]!r} stands twice")
        if self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} is not among the choices ({', '.join(self.choices)})")
        return self

    def identity(self) -> str:
        """The same for two rows that ask the same question."""
        choices = None if self.choices is None else sorted(map(normalised, self.choices))
        return json.dumps([normalised(self.system or ""), normalised(self.prompt), choices], ensure_ascii=False)


class Row(Question):
    """A line of the file: a question, and what `TrainingTask` says of it."""

    task_id: str | None = Field(default=None, min_length=1)
    """Unique over all files; None: made from the file's side and the line."""
    task_type: TaskType | None = Field(default=None, strict=False)
    """None: classification with choices, generation without."""
    difficulty: float = Field(default=0.5, ge=0, le=1)
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_steps: int = Field(default=8, ge=1)
    required_models: int | None = Field(default=None, ge=1)
    """Models that answer; None: the scenario's."""
    cooperation_level: float | None = Field(default=None, ge=0, le=1)
    """None: the scenario's."""

    def task(self, task_id: str, split: Split, required_models: int, cooperation_level: float) -> TrainingTask:
        """As a task; the arguments stand in for what the row does not say, `task_id` included."""
        by_shape = TaskType.GENERATION if self.choices is None else TaskType.CLASSIFICATION
        return TrainingTask(
            task_id=self.task_id or task_id,
            task_type=self.task_type or by_shape,
            difficulty=self.difficulty,
            reward_pool=self.reward_pool,
            max_steps=self.max_steps,
            required_models=self.required_models or required_models,
            cooperation_level=cooperation_level if self.cooperation_level is None else self.cooperation_level,
            content=self.model_dump(include=set(Question.model_fields), exclude_none=True),
            split=split,
        )


@dataclass(frozen=True, slots=True)
class Located:
    """A good row and where it stands."""

    source: Path | str
    line: int
    row: Row

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


class Problems:
    """Collects what is wrong, line by line, to say it all at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, place: str, what: str) -> None:
        self._found.append(f"{place}: {what}")

    def check(self) -> None:
        """Raises `ConfigError` if anything was added: the first `MAX_REPORTED`, then how many more."""
        if not self._found:
            return
        more = len(self._found) - MAX_REPORTED
        count = "1 bad row" if len(self._found) == 1 else f"{len(self._found)} bad rows"
        lines = [f"{count}; mend or remove what is named here, nothing was loaded:", *self._found[:MAX_REPORTED]]
        if more > 0:
            lines.append(f"… and {more} more")
        raise ConfigError("\n  ".join(lines))


def read_rows(path: Path, problems: Problems) -> list[Located]:
    """The good rows of a file; the bad ones go to `problems`.

    Blank lines are bad rows too, unless only blank lines follow. A byte order mark is ignored.

    Raises:
        ConfigError: the file cannot be read, or has no rows at all.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a JSON Lines file") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"{path} is empty; it needs one JSON object a line, such as {_EXAMPLE}")
    located = []
    for number, line in enumerate(lines, start=1):
        try:
            located.append(Located(path, number, _parse(line)))
        except ValueError as error:
            problems.add(f"{path}:{number}", str(error))
    return located


_EXAMPLE: Final = '{"prompt": "2 + 2 =", "answer": "4"}'


def _parse(line: bytes) -> Row:
    """Raises `ValueError` saying what is wrong with the line."""
    if not line.strip():
        raise ValueError("blank line between rows; blank lines are allowed at the end only")
    try:
        data = json.loads(line.decode(), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(data, dict):
        raise ValueError(f"a row must be a JSON object such as {_EXAMPLE}, not {type(data).__name__}")
    try:
        return Row.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, Row).replace("(top level): ", "")) from error


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    doubled = [key for key in keys if keys.count(key) > 1]
    if doubled:
        raise ValueError(f"key {doubled[0]!r} stands twice")
    return dict(pairs)


def check_task_ids(rows: Iterable[tuple[str, Located]], problems: Problems) -> None:
    """Every (task_id, row) that repeats an earlier task_id is a problem."""
    seen: dict[str, Located] = {}
    for task_id, located in rows:
        first = seen.setdefault(task_id, located)
        if first is not located:
            problems.add(located.place, f"task_id {task_id!r} is already used at {first.place}")


def check_disjoint(train: Iterable[Located], heldout: Iterable[Located], problems: Problems) -> None:
    """Every held-out row that asks a question of a training row is a problem."""
    trained = {located.row.identity(): located for located in train}
    for located in heldout:
        same = trained.get(located.row.identity())
        if same is not None:
            problems.add(located.place, f"asks the same question as {same.place}, so it would not be held out")


def falls_heldout(question: Question, share: float) -> bool:
    """Whether a question stands on the held-out side when about `share` of all questions do.

    By a hash of the question alone, so a question never changes sides when rows are added or reordered.
    """
    digest = hashlib.sha256(question.identity().encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def normalised(text: str) -> str:
    """Without differences of case and spacing."""
    return " ".join(text.split()).casefold()


def last_number(text: str) -> float | None:
    """The last number written in `text` ("1,234.5", "-3", "2e5"), or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def _exact(text: str, answer: str) -> bool:
    return normalised(text) == normalised(answer)


def _number(text: str, answer: str) -> bool:
    given, right = last_number(text), last_number(answer)
    return given is not None and right is not None and abs(given - right) <= 1e-6


def _contains(text: str, answer: str) -> bool:
    return normalised(answer) in normalised(text)


SCORERS: Final[Mapping[str, Callable[[str, str], bool]]] = {"exact": _exact, "number": _number, "contains": _contains}
"""Whether free text is right: (text, right answer) -> bool."""
