"""Signalling, two against two: each team invents a code of its own, and the better understood team wins.

    each round: both speakers are shown the target, each says a symbol to its listener, which names a target
    a point: the own listener is right and, with `intercept`, the rival's listener, who hears the symbol too, is not

It is the signalling game of Lewis (Convention, 1969), see `coterie.scenarios.signaling`, whose words it uses, played
by two teams on the same targets. Without interception each team gains by a better code alone. With it a code must
also differ from what the rival makes of it, as in work on learned secret communication (Abadi and Andersen, 2016,
arXiv 1610.06918). Seats: "red_speaker", "red_listener", "blue_speaker", "blue_listener".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from pydantic import Field

from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import Table
from coterie.scenarios.contests import SIDES
from coterie.scenarios.relay import Relay, RelayOptions
from coterie.scenarios.signaling import SYMBOLS, TARGETS
from coterie.types import Observation, Outcome, TrainingTask

_PROMPTS: Final = {
    "en": {
        "speaker": "Name a signal.",
        "listener": "Name the object.",
        "rival": "Name the rival's object.",
        "target": "Object:",
        "symbol": "Signal:",
        "space": " ",
    },
    "zh": {
        "speaker": "说信号。",
        "listener": "说物体。",
        "rival": "说对方的物体。",
        "target": "物体：",
        "symbol": "信号：",
        "space": "",
    },
}


class TeamSignalingOptions(RelayOptions):
    """Settings of signalling for teams."""

    symbols: int = Field(default=4, ge=2, le=16)
    """Words a speaker may say."""
    states: int = Field(default=4, ge=2, le=16)
    """Targets."""
    intercept: bool = False
    """Whether listeners also hear the rival's symbol, and take its point by naming the target."""


class TeamSignaling(Relay):
    """Two codes against each other.

    Metrics, of `play` and in expectation of `exact` alike: ``red_success`` and ``blue_success``, the share of rounds
    that count; ``success``, their mean; ``red_wins``, ``blue_wins``, ``draws`` of the game; with `intercept`,
    ``red_intercepted`` and ``blue_intercepted``, the share of a side's symbols the rival understood.
    """

    Options = TeamSignalingOptions
    id = "team-signaling"

    def __init__(self, options: TeamSignalingOptions) -> None:
        super().__init__(options, targets=options.states, words=options.symbols)
        self.options = options

    @property
    def steps(self) -> int:
        return self.relay.rounds * (2 if self.options.intercept else 1)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        rounds = await self.rounds(task, table)
        stolen = {}
        if self.options.intercept:
            stolen = {f"{s}_intercepted": sum(points[s].spoiled for points in rounds) / len(rounds) for s in SIDES}
        right = {side: sum(points[side].right for points in rounds) / len(rounds) for side in SIDES}
        return Outcome(
            scores=self.scores(table, rounds),
            accuracy={seat: right[seat.partition("_")[0]] for seat in table.seats},
            metrics={**self.game(rounds), **stolen},
        )

    async def intercepted(self, target: int, words: Sequence[int], table: Table) -> set[str]:
        if not self.options.intercept:
            return set()
        said = dict(zip(SIDES, words, strict=True))
        asked = [self._overhears(side, said[side], table.language) for side in SIDES]
        guesses = await choose(table, asked, "intercept")
        return {side for side, guess in zip(SIDES, guesses, strict=True) if guess == target}

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table`; nothing is sampled.

        Returns:
            The metrics of `play` in expectation, and ``<side>_bits``, the mutual information of target and symbol,
            0 .. log2(targets): how much a speaker says, understood or not.
        """
        speak, listen = await self.asked(table)
        words, targets = range(self.words), range(self.targets)
        found, success = {}, {}
        for side in SIDES:
            safe = [[1.0] * self.targets for _ in words]
            if self.options.intercept:
                asked = {w: self._overhears(side, w, table.language) for w in words}
                heard = await distributions(table, asked)
                safe = [[1.0 - p for p in heard[w]] for w in words]
                found[f"{side}_intercepted"] = 1.0 - math.fsum(
                    speak[side][t][w] * safe[w][t] / self.targets for t in targets for w in words
                )
            success[side] = [
                math.fsum(speak[side][t][w] * listen[side][w][t] * safe[w][t] for w in words) for t in targets
            ]
        return {**self.exact_game(success, speak), **found}

    def says(self, side: str, target: int, language: str) -> Question:
        text = _PROMPTS[language]
        user = text["target"] + text["space"] + TARGETS[language][target]
        shown = Observation(system=text["speaker"], user=user, prefix=text["symbol"])
        return Question(self.seat(side, self.speaker), shown, SYMBOLS[language][: self.words])

    def names(self, side: str, word: int, language: str) -> Question:
        return self._asked(self.seat(side, self.listener), "listener", word, language)

    def _overhears(self, side: str, word: int, language: str) -> Question:
        """What the other side's listener is asked of a symbol of `side`."""
        other = SIDES[1 - SIDES.index(side)]
        return self._asked(self.seat(other, self.listener), "rival", word, language)

    def _asked(self, seat: str, role: str, word: int, language: str) -> Question:
        text = _PROMPTS[language]
        user = text["symbol"] + text["space"] + SYMBOLS[language][word]
        shown = Observation(system=text[role], user=user, prefix=text["target"])
        return Question(seat, shown, TARGETS[language][: self.targets])
