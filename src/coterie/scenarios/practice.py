"""A table in memory, without models: for trying a scenario, for its tests, and for scripted play.

    table = PracticeTable(task, scenario.seats(task), seed=1, answer=lambda seat, seen, choices, rng: choices[0])
    outcome = await scenario.play(task, table)

Every seat is held by one function. It keeps the table's contract: at most `task.max_steps` turns a seat, answers
among the choices, free text cut at `max_tokens` (a token is a word here), random numbers that depend on seed, seat and
turn alone. Its turns are never trainable.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from coterie.errors import ScenarioError
from coterie.scenarios.question import check_question
from coterie.types import (
    ModelRole,
    Observation,
    PlayerCard,
    Seat,
    SeatId,
    Strategy,
    Tier,
    TrainingMode,
    TrainingTask,
    Turn,
)

Answer = Callable[[SeatId, Observation, Sequence[str] | None, random.Random], str]
"""(seat, what it is shown, choices, rng) -> the text it answers."""
Probabilities = Callable[[SeatId, Observation, Sequence[str]], Sequence[float]]
"""(seat, what it is shown, choices) -> the probability of each."""
Hearing = Callable[[PlayerCard, PlayerCard], bool]
"""(listener, speaker) -> whether advice may pass."""

_WORDS = ("yes", "no", "red", "seven", "7", "42", "one and two", "cooperate and optimise", "合作", "a long way round")


def evenly(seat: SeatId, observation: Observation, choices: Sequence[str]) -> Sequence[float]:
    """Every choice is as likely as any other."""
    return [1 / len(choices)] * len(choices)


def everyone(listener: PlayerCard, speaker: PlayerCard) -> bool:
    """All hear all."""
    return True


def nobody(listener: PlayerCard, speaker: PlayerCard) -> bool:
    """Nobody hears anybody."""
    return False


@dataclass(frozen=True, slots=True)
class Asked:
    """One question a table put to a seat."""

    seat: SeatId
    observation: Observation
    choices: tuple[str, ...] | None
    max_tokens: int
    kind: str


class PracticeTable:
    """A `Table` of seats held by functions. `asked` has every question so far, in order."""

    def __init__(
        self,
        task: TrainingTask,
        seats: Sequence[Seat],
        *,
        seed: int = 0,
        answer: Answer | None = None,
        probabilities: Probabilities = evenly,
        cards: Collection[PlayerCard] = (),
        mode: TrainingMode = TrainingMode.COOPERATIVE,
        language: str = "en",
        hearing: Hearing = everyone,
        withheld: Collection[SeatId] = (),
        unanswered: int | None = None,
    ) -> None:
        """
        Args:
            answer: what every seat says; None: choices are drawn by `probabilities`, free text is a few random words.
            probabilities: what `distribution` reports.
            cards: of seats that are not neutral, teamless strangers.
            hearing: who may hear whom; nobody ever hears itself.
            withheld: speakers whose advice is not delivered.
            unanswered: the question, counted from 0, that never gets an answer; for trying what a play does when it
                is cancelled.

        Raises:
            ScenarioError: a card or a withheld speaker is of no seat.
        """
        self.task = task
        self.seats = tuple(seat.seat_id for seat in seats)
        self.language = language
        self.rng = random.Random(f"{seed}:table")
        known = {card.seat_id: card for card in cards}
        strangers = sorted({*known, *withheld} - set(self.seats))
        if strangers:
            raise ScenarioError(f"there is no seat {strangers[0]!r}; the seats are {', '.join(self.seats)}")
        self.strategy = Strategy.of(task, mode, any(card.role is ModelRole.LEADER for card in known.values()))
        self._hearing = hearing
        self._withheld = frozenset(withheld)
        self.asked: list[Asked] = []
        self.unanswered = unanswered
        self.waits = asyncio.Event()
        """Set once the unanswered question was asked."""
        self._handles = {
            seat: PracticeSeat(self, known.get(seat, PlayerCard(seat, None)), seed, answer, probabilities)
            for seat in self.seats
        }

    def __getitem__(self, seat_id: SeatId) -> PracticeSeat:
        if seat_id not in self._handles:
            raise ScenarioError(f"there is no seat {seat_id!r}; the seats are {', '.join(self.seats)}")
        return self._handles[seat_id]

    def hears(self, listener: SeatId, speaker: SeatId) -> bool:
        """See `Table.hears`."""
        return listener != speaker and self._hearing(self[listener].card, self[speaker].card)

    def delivers(self, speaker: SeatId) -> bool:
        """See `Table.delivers`."""
        return speaker not in self._withheld


class PracticeSeat:
    """A `SeatHandle` that keeps what was shown and said."""

    def __init__(
        self, table: PracticeTable, card: PlayerCard, seed: int, answer: Answer | None, probabilities: Probabilities
    ) -> None:
        self._table = table
        self.card = card
        self.shown: list[Observation] = []
        """One for each turn."""
        self.turns: list[Turn] = []
        self._seed = seed
        self._answer = answer
        self._probabilities = probabilities

    async def act(
        self,
        observation: Observation,
        *,
        choices: Sequence[str] | None = None,
        max_tokens: int = 16,
        kind: str = "answer",
    ) -> Turn:
        """See `SeatHandle.act`. Raises `ScenarioError` for empty prompts and for choices that are none."""
        seat = self.card.seat_id
        table, most = self._table, self._table.task.max_steps
        if len(self.turns) >= most:
            raise ScenarioError(f"seat {seat!r} was asked for more than task.max_steps = {most} turns")
        check_question(seat, observation, choices, max_tokens)
        table.asked.append(Asked(seat, observation, None if choices is None else tuple(choices), max_tokens, kind))
        if len(table.asked) - 1 == table.unanswered:
            table.waits.set()
            await asyncio.Event().wait()
        rng = random.Random(f"{self._seed}:{seat}:{len(self.turns)}")
        logprob = 0.0
        if self._answer is not None:
            text = self._answer(seat, observation, choices, rng)
        elif choices is None:
            text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 4)))
        else:
            probabilities = self._distribution(observation, choices)
            (index,) = rng.choices(range(len(choices)), probabilities)
            text, logprob = choices[index], math.log(probabilities[index])
        if choices is not None and text not in choices:
            raise ScenarioError(f"seat {seat!r} answered {text!r}, which is none of {', '.join(map(repr, choices))}")
        words = text.split()
        cut = choices is None and len(words) > max_tokens
        turn = Turn(
            seat_id=seat,
            model_id=self.card.model_id,
            adapter=None,
            kind=kind,
            prompt_ids=(),
            token_ids=tuple(range(min(len(words), max_tokens))),
            logprobs=(logprob, *[0.0] * (len(words) - 1))[: min(len(words), max_tokens)],
            allowed=None,
            bias=None,
            temperature=1.0,
            entropy=(),
            text=" ".join(words[:max_tokens]) if cut else text,
            choice=None if choices is None else list(choices).index(text),
            valid=not cut,
            tier=Tier.SCRIPT,
        )
        self.shown.append(observation)
        self.turns.append(turn)
        return turn

    async def distribution(self, observation: Observation, choices: Sequence[str]) -> tuple[float, ...]:
        """See `SeatHandle.distribution`."""
        check_question(self.card.seat_id, observation, choices, 1)
        return self._distribution(observation, choices)

    def _distribution(self, observation: Observation, choices: Sequence[str]) -> tuple[float, ...]:
        probabilities = tuple(self._probabilities(self.card.seat_id, observation, choices))
        if len(probabilities) != len(choices) or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-9:
            raise ScenarioError(
                f"seat {self.card.seat_id!r}: {list(probabilities)} are no probabilities of {list(choices)}"
            )
        return probabilities
