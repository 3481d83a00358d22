"""The signalling game of Lewis (Convention, 1969): models that share no code invent one.

    target (drawn by the task) -> sender sees it, says one symbol -> receivers see the symbol, name a target

Nobody tells the players what a symbol means; only success is paid, to sender and receivers alike. With as many
symbols as targets there are n! perfect codes, all equally good, and untrained play succeeds once in n.

Every distinct prompt is the same text in all episodes, and short, so an engine that computes equal prompts once
computes each of them once an update. There is no advice turn: the message is the game. There is one task for each
target and no other content, so training and held-out play share their targets (`single_task`); what is measured is
whether a code was agreed, and `exact` measures it without sampling. To let models take turns at the seats, set
`rollout.rotate_seats`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from pydantic import Field, field_validator, model_validator

from coterie.errors import ScenarioError
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TaskType, TrainingTask

SYMBOLS: Final[Mapping[str, tuple[str, ...]]] = {
    language: tuple(words.split())
    for language, words in {
        "en": "red blue green pink black white purple orange yellow brown gray violet amber ivory gold silver",
        "zh": "红 蓝 绿 紫 黑 白 粉 橙 黄 棕 灰 青 褐 银 金 赤",
    }.items()
}
TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    language: tuple(words.split())
    for language, words in {
        "en": "chair clock piano train shirt bottle horse bread ship book bell lamp door key cup hat",
        "zh": "椅 钟 琴 车 衣 瓶 马 面 船 书 铃 灯 门 刀 杯 帽",
    }.items()
}
"""Built-in words, colours for symbols and things for targets: single tokens of the embedded model, or single
characters."""

_PROMPTS: Final = {
    "en": {"sender": "Name a signal.", "receiver": "Name the object.", "target": "Object:", "symbol": "Signal:"},
    "zh": {"sender": "说信号。", "receiver": "说物体。", "target": "物体：", "symbol": "信号："},
}
_SPACE: Final = {"en": " ", "zh": ""}
"""Between a label and the word after it, in what is shown."""

Words = int | tuple[str, ...]


class SignalingOptions(ScenarioOptions):
    """Settings of the signalling game."""

    symbols: Words = 4
    """Words the sender may say: a list, or how many of the built-in ones (2..16)."""
    states: Words | None = None
    """Words for the targets, as `symbols`; None: as many built-in ones as there are symbols."""
    receivers: int = Field(default=1, ge=1, le=16)
    """Models that hear the sender. One is seated as "receiver", several as "receiver_1", "receiver_2", …"""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=1.0, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @field_validator("symbols", "states")
    @classmethod
    def _words(cls, value: Words | None) -> Words | None:
        if isinstance(value, int) and not 2 <= value <= 16:
            raise ValueError("must be 2 to 16 of the built-in words, or a list of your own")
        if not isinstance(value, tuple):
            return value
        if len(value) < 2:
            raise ValueError("needs at least two words")
        if any(not word or word != word.strip() for word in value):
            raise ValueError("words must not be empty or begin or end with a space")
        doubled = sorted({word for word in value if value.count(word) > 1})
        if doubled:
            raise ValueError(f"the word {doubled[0]!r} stands twice")
        return value

    @model_validator(mode="after")
    def _disjoint(self) -> SignalingOptions:
        if self.states is None and isinstance(self.symbols, tuple) and len(self.symbols) > 16:
            raise ValueError("more than 16 symbols need a list of states; only 16 are built in")
        for language in _PROMPTS:
            symbols, targets = _word_lists(self, language)
            shared = sorted(set(symbols) & set(targets))
            if shared:
                raise ValueError(f"the word {shared[0]!r} is both a symbol and a state; a code needs two sets of words")
        return self


class Signaling:
    """One sender, one or more receivers, one symbol.

    Scores: a receiver's is 1 if it names the target; the sender's is the mean over receivers. `task.content` is
    ``{"target": index}``; a task without content gets a target that follows from its `task_id`.
    """

    Options = SignalingOptions
    single_task = True

    def __init__(self, options: SignalingOptions) -> None:
        self.options = options
        count = options.receivers
        self._receivers = ["receiver"] if count == 1 else [f"receiver_{i}" for i in range(1, count + 1)]
        self._targets = len(_word_lists(options, "en")[1])

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every target once, in an order drawn from `seed`; for TRAIN again and again, each time reordered."""
        rng = random.Random(f"signaling:{split}:{seed}")
        while True:
            for target in rng.sample(range(self._targets), self._targets):
                yield TrainingTask(
                    task_id=f"signaling-{target}",
                    task_type=TaskType.COLLABORATION,
                    difficulty=min(1.0, math.log2(self._targets) / 4),
                    reward_pool=self.options.reward_pool,
                    max_steps=1,
                    required_models=1 + len(self._receivers),
                    cooperation_level=self.options.cooperation_level,
                    content={"target": target},
                    split=split,
                )
            if split is Split.HELDOUT:
                return

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        first, *others = self._receivers
        return [Seat("sender"), Seat(first), *(Seat(other, symmetric_with=first) for other in others)]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for a target that is none of the states; a task may have no content."""
        self._target(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        target = self._target(task)
        symbols, targets = _word_lists(self.options, table.language)
        signal = await table["sender"].act(
            _sender_sees(targets[target], table.language),
            choices=symbols,
            kind="signal",
        )
        if signal.choice is None:  # an outside player that did not keep to the choices: nothing was signalled
            right = dict.fromkeys(self._receivers, 0.0)
        else:
            seen = _receiver_sees(symbols[signal.choice], table.language)
            answers = await asyncio.gather(
                *(table[seat].act(seen, choices=targets, kind="guess") for seat in self._receivers)
            )
            right = {seat: float(turn.choice == target) for seat, turn in zip(self._receivers, answers, strict=True)}
        success = sum(right.values()) / len(right)
        scores = {"sender": success, **right}
        return Outcome(scores=scores, accuracy=scores, metrics={"success": success})

    async def exact(self, table: Table) -> dict[str, float]:
        """Success probability of the policies at `table` over uniformly drawn targets, without sampling.

        Returns:
            ``success``: mean over targets t and receivers of sum_m P(m | t) P(t | m).
            ``all_correct``: the same, all receivers right at once (they answer independently).
            ``mutual_information_bits``: between target and symbol, 0 .. log2(targets); how much the sender says,
            understood or not.
        """
        symbols, targets = _word_lists(self.options, table.language)
        sender, *receivers = await asyncio.gather(
            _rows(table, "sender", [_sender_sees(word, table.language) for word in targets], symbols),
            *(
                _rows(table, seat, [_receiver_sees(word, table.language) for word in symbols], targets)
                for seat in self._receivers
            ),
        )
        success = together = 0.0
        for target, says in enumerate(sender):
            for symbol, probability in enumerate(says):
                right = [receiver[symbol][target] for receiver in receivers]
                success += probability * sum(right) / len(right)
                together += probability * math.prod(right)
        return {
            "success": success / len(targets),
            "all_correct": together / len(targets),
            "mutual_information_bits": mutual_information_bits(sender),
        }

    def _target(self, task: TrainingTask) -> int:
        if not task.content:
            return int.from_bytes(hashlib.sha256(task.task_id.encode()).digest()[:8]) % self._targets
        target = task.content.get("target")
        if not isinstance(target, int) or not 0 <= target < self._targets:
            raise ScenarioError(
                f"task {task.task_id!r}: content['target'] is {target!r}; it must be a number 0..{self._targets - 1}"
            )
        return target


def mutual_information_bits(rows: Sequence[Sequence[float]]) -> float:
    """Mutual information, in bits, of a uniformly drawn row index and a column drawn from that row's probabilities.

    Args:
        rows: conditional probabilities, (inputs, outputs); each row sums to 1.
    """
    marginal = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    bits = sum(p * math.log2(p / q) for row in rows for p, q in zip(row, marginal, strict=True) if p > 0)
    return max(0.0, bits / len(rows))  # rounding may leave -1e-17 where nothing is said


async def _rows(
    table: Table, seat: SeatId, observations: Sequence[Observation], words: Sequence[str]
) -> list[tuple[float, ...]]:
    return list(await asyncio.gather(*(table[seat].distribution(seen, words) for seen in observations)))


def _word_lists(options: SignalingOptions, language: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Symbols and targets of these options in a language."""
    symbols = SYMBOLS[language][: options.symbols] if isinstance(options.symbols, int) else options.symbols
    states = len(symbols) if options.states is None else options.states
    return symbols, TARGETS[language][:states] if isinstance(states, int) else states


def _sender_sees(target: str, language: str) -> Observation:
    text = _PROMPTS[language]
    return Observation(system=text["sender"], user=text["target"] + _SPACE[language] + target, prefix=text["symbol"])


def _receiver_sees(symbol: str, language: str) -> Observation:
    text = _PROMPTS[language]
    return Observation(system=text["receiver"], user=text["symbol"] + _SPACE[language] + symbol, prefix=text["target"])
