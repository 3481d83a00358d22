"""What the content of each kind of task must hold, for tasks whose content a user wrote.

    task.content -> the model of its task_type -> nothing, or an error that names the task, the key and what is wrong

The kinds make content that fits; a user's is checked when it is queued and again when it is played, so that a missing
key is named before any turn is taken.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator

from coterie.config import explain
from coterie.errors import ScenarioError
from coterie.scenarios.tasks.kinds import KINDS
from coterie.types import Split, TaskType, TrainingTask

Word = Annotated[str, Field(min_length=1)]
Number = StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Labelled(_Content):
    labels: tuple[Word, ...] = Field(min_length=2)
    """Possible answers."""
    answer: Word

    @model_validator(mode="after")
    def _one_is_right(self) -> _Labelled:
        _distinct("labels", self.labels)
        _among("answer", self.answer, "labels", self.labels)
        return self


class Sentiment(_Labelled):
    """A review of something, good or bad."""

    form: Literal["sentiment"]
    subject: Word
    adjective: Word
    opener: Word | None = None
    """A first half of the sentence that does not matter; absent: none."""


class Topic(_Labelled):
    """A sentence that names one thing."""

    form: Literal["topic"]
    noun: Word
    place: Word


class Numbers(_Content):
    """Which number is the largest?"""

    numbers: tuple[Number, ...] = Field(min_length=2)
    answer: Number

    @model_validator(mode="after")
    def _largest(self) -> Numbers:
        _distinct("numbers", self.numbers)
        if self.answer != max(self.numbers):
            raise ValueError(f"answer is {self.answer}, but the largest of numbers is {max(self.numbers)}")
        return self


class Line(_Content):
    """A line to be written."""

    words: tuple[Word, ...] = Field(min_length=1)
    """To be used in it."""
    limit: StrictInt = Field(ge=1)
    """Most words in English; in Chinese twice as many characters."""
    mark: Literal["!", "?"]
    """Its end."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Line:
        _distinct("words", self.words)
        if self.limit < len(self.words):
            raise ValueError(f"limit is {self.limit}, which has no room for {len(self.words)} words")
        return self


class Offers(_Content):
    """What is for sale."""

    offers: tuple[tuple[Word, Number], ...] = Field(min_length=2)
    """(name, price)."""

    @model_validator(mode="after")
    def _one_is_cheapest(self) -> Offers:
        _distinct("offers", [name for name, _ in self.offers])
        if len({price for _, price in self.offers}) == 1:
            raise ValueError("all offers have the same price; there is nothing to choose")
        return self


class Secret(_Content):
    """A coloured thing, of which some seats know the colour and the others the thing."""

    colours: tuple[Word, ...] = Field(min_length=2)
    items: tuple[Word, ...] = Field(min_length=2)
    colour: Word
    """The right one of colours."""
    item: Word
    """The right one of items."""

    @model_validator(mode="after")
    def _one_is_right(self) -> Secret:
        for one, many, values in (("colour", "colours", self.colours), ("item", "items", self.items)):
            _distinct(many, values)
            _among(one, getattr(self, one), many, values)
        return self


_FORMS: Final[Mapping[str, type[_Content]]] = {"sentiment": Sentiment, "topic": Topic}
_MODELS: Final[Mapping[TaskType, type[_Content]]] = {
    TaskType.REASONING: Numbers,
    TaskType.GENERATION: Line,
    TaskType.OPTIMIZATION: Offers,
    TaskType.COLLABORATION: Secret,
}


def check_content(task: TrainingTask) -> None:
    """Raises `ScenarioError` unless a task's content has all its type needs, and nothing else."""
    difficulty, model = task.difficulty, _MODELS.get(task.task_type)
    if model is None:  # a classification: its form decides what else there is
        form = task.content.get("form")
        difficulty, model = 0.5 if form == "topic" else 0.25, _FORMS.get(str(form))
    if model is None:
        problem = f"form is {form!r}; it must be one of {', '.join(map(repr, _FORMS))}"
    else:
        try:
            model.model_validate(dict(task.content))
            return
        except ValidationError as error:
            problem = explain(error, model).replace("(top level): ", "")
    example = KINDS[task.task_type].make(random.Random(0), difficulty, Split.TRAIN, task.required_models)
    raise ScenarioError(
        f"task {task.task_id!r}, content of a {task.task_type} task: {problem}; it looks like {example}, "
        "or leave content out and it is made from task_id and difficulty"
    )


def _distinct(what: str, values: Sequence[object]) -> None:
    doubled = [value for value in values if values.count(value) > 1]
    if doubled:
        raise ValueError(f"{what} has {doubled[0]!r} twice")


def _among(one: str, value: str, many: str, values: Sequence[str]) -> None:
    if value not in values:
        raise ValueError(f"{one} {value!r} is not among {many} ({', '.join(values)})")
