"""Taboo: say a word that lets your partner name the target, but not one of the words that would give it away.

    each round: givers are shown the target and its taboo words, each says one clue off a list; guessers hear the clue
    and name a target
    a point: the guesser is right and the clue was not taboo

There are six targets and a list of twelve clues, two of which go well with each target; the more obvious one of the
two is taboo for it and free for the others. With `taboo` "punished" (the default) a taboo clue may be said and costs
the round, so that what is learned is not to say it; "excluded" takes it off the giver's list. Unlike the codes of
`team_signaling`, clues mean something to a language model before any training, and `fitting` tells whether a team
keeps to what the words mean: then a partner trained elsewhere understands them too.

Seats: "red_giver", "red_guesser", "blue_giver", "blue_guesser"; with one team the red ones. The targets are few and
training and held-out games share them (`single_task`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question
from coterie.scenarios.base import Script, Table
from coterie.scenarios.contests import SIDES, by_seat
from coterie.scenarios.relay import Relay, RelayOptions
from coterie.types import Observation, Outcome, TrainingTask

WORDS: Final = {
    "en": {
        "beach": ("sand", "sea"),
        "hospital": ("doctor", "nurse"),
        "farm": ("cow", "milk"),
        "castle": ("king", "queen"),
        "winter": ("snow", "ice"),
        "night": ("moon", "stars"),
    },
    "zh": {
        "海": ("沙", "船"),
        "医": ("病", "药"),
        "农": ("牛", "田"),
        "宫": ("王", "后"),
        "冬": ("雪", "冰"),
        "夜": ("月", "星"),
    },
}
"""Target -> (taboo clue, fitting clue). Single tokens of the embedded model, or single characters."""

_PROMPTS: Final = {
    "en": {"giver": "Give a clue.", "guesser": "Name the word.", "taboo": "Not:", "target": "Word:", "clue": "Clue:"},
    "zh": {"giver": "给提示。", "guesser": "说出词。", "taboo": "禁：", "target": "词：", "clue": "提示："},
}
_SPACE: Final = {"en": " ", "zh": ""}


class TabooOptions(RelayOptions):
    """Settings of Taboo."""

    teams: Literal[1, 2] = 2
    """That play the same targets; one has nobody to beat."""
    taboo: Literal["punished", "excluded"] = "punished"
    """punished: a taboo clue may be said and costs the round. excluded: it is not on the giver's list."""
    targets: int = Field(default=6, ge=2, le=6)
    """How many of the built-in targets, with their clues, are played."""


class Taboo(Relay):
    """Clue givers and guessers.

    Metrics, of `play` and in expectation of `exact` alike: ``<side>_success``, ``success``, ``red_wins``,
    ``blue_wins``, ``draws`` as in `coterie.scenarios.team_signaling`; ``taboo``, the share of clues that were taboo;
    ``fitting``, the share that were the target's own fitting word.

    Scripts: ``careful``, which gives the fitting clue, and names the target a clue goes with.
    """

    Options = TabooOptions
    id = "taboo"
    speaker = "giver"
    listener = "guesser"

    def __init__(self, options: TabooOptions) -> None:
        super().__init__(options, targets=options.targets, words=2 * options.targets)
        self.options = options
        self.sides = SIDES[: options.teams]
        self.scripts: Mapping[str, Script] = {"careful": _careful}

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        rounds = await self.rounds(task, table)
        clues = [(t, point.word) for t, points in zip(self.targets_of(task), rounds, strict=True)
                 for point in points.values()]  # fmt: skip
        right = {side: sum(points[side].right for points in rounds) / len(rounds) for side in self.sides}
        return Outcome(
            scores=self.scores(table, rounds),
            accuracy=by_seat(table.seats, right),
            metrics={
                **self.game(rounds),
                "taboo": sum(self.spoils(target, word) for target, word in clues) / len(clues),
                "fitting": sum(word == _fitting(target) for target, word in clues) / len(clues),
            },
        )

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table`; nothing is sampled.

        Returns:
            The metrics of `play` in expectation, and ``<side>_bits``, the mutual information of target and clue.
        """
        speak, listen = await self.asked(table)
        success = {
            side: [
                math.fsum(speak[side][t][w] * listen[side][w][t] for w in range(self.words) if not self.spoils(t, w))
                for t in range(self.targets)
            ]
            for side in self.sides
        }
        cases = self.targets * len(self.sides)
        every = [(side, t) for side in self.sides for t in range(self.targets)]
        return {
            **self.exact_game(success, speak),
            "taboo": math.fsum(speak[side][t][_taboo(t)] for side, t in every) / cases,
            "fitting": math.fsum(speak[side][t][_fitting(t)] for side, t in every) / cases,
        }

    def says(self, side: str, target: int, language: str) -> Question:
        text, space = _PROMPTS[language], _SPACE[language]
        clues = self._clues(language)
        user = f"{text['taboo']}{space}{clues[_taboo(target)]}\n{text['target']}{space}{self._names(language)[target]}"
        if self.options.taboo == "excluded":
            clues = tuple(clue for word, clue in enumerate(clues) if word != _taboo(target))
        shown = Observation(system=text["giver"], user=user, prefix=text["clue"])
        return Question(self.seat(side, self.speaker), shown, clues)

    def names(self, side: str, word: int, language: str) -> Question:
        text = _PROMPTS[language]
        user = text["clue"] + _SPACE[language] + self._clues(language)[word]
        shown = Observation(system=text["guesser"], user=user, prefix=text["target"])
        return Question(self.seat(side, self.listener), shown, self._names(language))

    def said(self, target: int, choice: int) -> int:
        missing = self.options.taboo == "excluded" and choice >= _taboo(target)
        return choice + int(missing)

    def spoils(self, target: int, word: int) -> bool:
        return word == _taboo(target)

    def _names(self, language: str) -> tuple[str, ...]:
        return tuple(WORDS[language])[: self.targets]

    def _clues(self, language: str) -> tuple[str, ...]:
        return tuple(clue for name in self._names(language) for clue in WORDS[language][name])


def _taboo(target: int) -> int:
    """The clue that may not be given for a target."""
    return 2 * target


def _fitting(target: int) -> int:
    """The clue that goes with a target and may be given."""
    return 2 * target + 1


def _careful(seen: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """Gives the fitting clue, and names the target a clue goes with."""
    shown = seen.user.splitlines()[-1]
    for words in WORDS.values():
        for target, clues in words.items():
            if shown.endswith(target):
                return clues[1]
            if shown.endswith(clues):
                return target
    raise ScenarioError(f"the script 'careful' cannot read {shown!r}")
