"""A scenario for benchmarks: answer given prompts in free text; the reward is the share of even token ids.

Every task has one seat. With several models the tasks are dealt to them in turn, as matchmaking does where there are
more models than seats, so the number of tokens does not depend on how many models there are. The same prompts are
played again and again: nothing here is meant to be learned.
"""

from __future__ import annotations

from collections.abc import Iterator

from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

SEAT = "writer"


class EvenTokensOptions(ScenarioOptions):
    """Settings."""

    prompts: tuple[tuple[str, str], ...]
    """(system, user) messages; an empty system message leaves the chat template's own."""
    tokens: int
    """Most tokens of an answer."""


class EvenTokens:
    """See the module."""

    Options = EvenTokensOptions
    single_task = True

    def __init__(self, options: EvenTokensOptions) -> None:
        self.options = options

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        number = 0
        while True:
            at = number % len(self.options.prompts)
            yield TrainingTask(f"{split}-{number}", TaskType.GENERATION, content={"prompt": at}, split=split)
            number += 1

    def seats(self, task: TrainingTask) -> list[Seat]:
        return [Seat(SEAT)]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        system, user = self.options.prompts[task.content["prompt"]]
        turn = await table[SEAT].act(Observation(user=user, system=system), max_tokens=self.options.tokens)
        even = sum(token % 2 == 0 for token in turn.token_ids)
        return Outcome(scores={SEAT: even / max(1, len(turn.token_ids))})
