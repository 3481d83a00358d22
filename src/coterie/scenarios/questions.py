"""Questions with a right answer, whatever they come from: who is asked, who advises, and what an answer is worth.

    advice (who speaks: see `teamwork`) -> every seat answers -> accuracy * efficiency

A scenario of questions says where its tasks come from, which `Question` a task is, and how right an answer is; see
`jsonl.JsonLines` for questions from a file.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import Field

from coterie.scenarios.base import ScenarioOptions, Table
from coterie.scenarios.jsonl_rows import Question
from coterie.scenarios.teamwork import advice_speakers, heard_by, response_quality, team_scores
from coterie.types import ADVICE, Observation, Outcome, Seat, SeatId, TrainingTask, Turn

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


class QuestionOptions(ScenarioOptions):
    """Settings that all scenarios of questions have."""

    show_choices: bool = True
    """Whether the choices are listed after the prompt; switch off where your prompts name them."""
    required_models: int = Field(default=1, ge=1)
    """Models that answer, for tasks that do not say."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """For tasks that do not say."""


class Questions(ABC):
    """Every seat answers the question; seats that may speak give advice first. All seats have the same rules.

    Scores: accuracy times efficiency: the share of its token allowance (`max_tokens` for the answer, and as much as
    advice may have) a seat left unused; allowances are pooled where the strategy shares resources.

    Metrics: ``accuracy``, mean over seats; ``response_quality``, mean keyword bonus of the answers.
    """

    def __init__(self, options: QuestionOptions) -> None:
        self._show_choices = options.show_choices

    @abstractmethod
    def question(self, task: TrainingTask) -> Question:
        """What a task asks. Raises `ScenarioError` for content that is no question of this scenario."""

    @abstractmethod
    def accuracy(self, task: TrainingTask, question: Question, turn: Turn) -> float:
        """How right an answer is, in [0, 1]."""

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [
            Seat(f"seat_{number}", symmetric_with=None if number == 1 else "seat_1")
            for number in range(1, task.required_models + 1)
        ]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is no question, or none and no row of that id."""
        self.question(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        question = self.question(task)
        speakers = advice_speakers(table)
        said = await asyncio.gather(*(self._advise(question, table, seat) for seat in speakers))
        advice = {seat: text for seat, turn in zip(speakers, said, strict=True) if (text := _text(question, turn))}
        answers = await asyncio.gather(*(self._answer(question, table, seat, advice) for seat in table.seats))
        accuracy = {seat: self.accuracy(task, question, turn) for seat, turn in zip(table.seats, answers, strict=True)}
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
        if question.choices is not None and self._show_choices:
            lines.append(text["choices"] + text["and"].join(question.choices))
        system = text["system"] if question.system is None else question.system
        return Observation(system=system, user="\n".join([*lines, *more]), prefix=prefix)


def _advice_allowance(question: Question) -> int:
    return ADVICE_TOKENS if question.choices is None else question.max_tokens


def _text(question: Question, turn: Turn) -> str:
    """What a turn says to others; "" if nothing."""
    if question.choices is None:
        return " ".join(turn.text.split())
    return "" if turn.choice is None else question.choices[turn.choice]
