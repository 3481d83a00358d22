"""Two-player matrix games, played once or repeatedly.

    each round: both seats see the payoffs and the last `memory` rounds, then choose at the same time
    score = mean payoff over the rounds, moved to [0, 1] by the least and the greatest payoff of the game

The actions are shown as neutral words ("blue", "green"), so that what a language model has read of dilemmas does not
decide; what a word does stands only in the payoffs. The prompt does not say what to play for: that is the mode's
business, through the reward. How many rounds are left is not shown either.

A matrix game is one task without further content: training and held-out play share it (`single_task`). Policies see
at most `memory` rounds, so the game is a Markov chain over those rounds, and `exact` computes frequencies, payoffs and
NashConv without sampling.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

from pydantic import Field, model_validator

from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.bimatrix import (
    GAMES,
    Bimatrix,
    History,
    JointAction,
    histories,
    nash_conv,
    occupancy,
    remembered,
)
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TaskType, TrainingTask

ROW: Final = "row"
COLUMN: Final = "column"

LABELS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("blue", "green", "orange", "purple", "gray", "pink", "brown", "white"),
    "zh": ("青", "红", "金", "绿", "蓝", "紫", "灰", "白"),
}
"""How actions are shown, where `labels` does not say."""

_PROMPTS: Final = {
    "en": {
        "system": "Choose a word.",
        "points": "Points (you, other):",
        "history": "Rounds before (you, other): ",
        "prefix": "You:",
    },
    "zh": {
        "system": "选一个词。",
        "points": "得分（你、对方）：",
        "history": "前几轮（你、对方）：",
        "prefix": "你：",
    },
}


class MatrixOptions(ScenarioOptions):
    """Settings of a matrix game."""

    game: (
        Literal["prisoners_dilemma", "stag_hunt", "matching_pennies", "rock_paper_scissors", "coordination"] | None
    ) = None
    """A game by name; None: the prisoner's dilemma, unless `payoffs` are given."""
    payoffs: tuple[tuple[tuple[float, float], ...], ...] | None = None
    """Your own game: payoffs[i][j] = [row's, column's] when row takes its action i and column its action j."""
    actions: tuple[str, ...] | None = None
    """Names of the actions of your own game, in the metrics; None: "a1", "a2", …"""
    labels: tuple[str, ...] | None = None
    """Words the actions are shown as, for both seats alike; None: neutral built-in ones (up to eight actions)."""
    rounds: int = Field(default=1, ge=1, le=20)
    """Times the game is played in one episode."""
    memory: int = Field(default=1, ge=0, le=8)
    """Past rounds a seat is shown; matters from the second round on."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @model_validator(mode="after")
    def _fits(self) -> MatrixOptions:
        if self.game is not None and self.payoffs is not None:
            raise ValueError("give either game or payoffs, not both")
        if self.actions is not None and self.payoffs is None:
            raise ValueError("actions names the actions of your own payoffs; a game by name has its own")
        widest = max(_bimatrix(self).shape)
        if self.labels is None and widest > len(LABELS["en"]):
            raise ValueError(f"{widest} actions need labels; only {len(LABELS['en'])} are built in")
        if self.labels is not None:
            if len(self.labels) != widest:
                raise ValueError(f"labels has {len(self.labels)} words, the game has {widest} actions")
            if len(set(self.labels)) < len(self.labels):
                raise ValueError("labels must differ from each other")
            odd = [label for label in self.labels if not re.fullmatch(r"\w+", label)]
            if odd:
                raise ValueError(f"label {odd[0]!r} must be one word of letters, digits or '_'")
        return self


class Matrix:
    """Seats "row" and "column" choose at the same time, `rounds` times.

    Metrics, of `play` (shares of the rounds played) and of `exact` (probabilities) alike: ``<seat>_<action>``;
    ``cooperation``, the share of cooperate or stag among all choices, in games that have such an action;
    ``joint_payoff``, both payoffs of a round summed, in the game's own units; ``efficiency``, that sum by the
    greatest one possible, in games where that is positive.

    Scripts: ``always_<action>``, ``random``, and, in games where both seats have the same actions and see the round
    before, ``tit_for_tat`` (first action first, then what the other did last; Axelrod, 1984).
    """

    Options = MatrixOptions
    single_task = True

    def __init__(self, options: MatrixOptions) -> None:
        self.options = options
        self.game = _bimatrix(options)
        self.scripts: Mapping[str, Script] = self._scripts()
        self._observations: dict[tuple[SeatId, History, str], Observation] = {}

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """The one task: endlessly for TRAIN, once for HELDOUT."""
        task = TrainingTask(
            task_id=f"matrix-{self.game.name}",
            task_type=TaskType.COLLABORATION,
            reward_pool=self.options.reward_pool,
            max_steps=self.options.rounds,
            required_models=2,
            cooperation_level=self.options.cooperation_level,
            content={"game": self.game.name},
            split=split,
        )
        return repeated(task)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(ROW), Seat(COLUMN, symmetric_with=ROW if self.game.symmetric else None)]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        rounds: History = ()
        for _ in range(self.options.rounds):
            history = remembered(rounds, self.options.memory)
            asked = [self.question(seat, history, table.language) for seat in (ROW, COLUMN)]
            row, column = await choose(table, asked, "move")
            rounds = (*rounds, (row, column))
        frequencies = {pair: rounds.count(pair) / len(rounds) for pair in set(rounds)}
        payoffs = self.game.expected(frequencies)
        scores = {seat: self.game.normalised(payoff) for seat, payoff in zip((ROW, COLUMN), payoffs, strict=True)}
        return Outcome(scores=scores, metrics=self._metrics(frequencies))

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table`, and how far they are from equilibrium; no sampling.

        Returns:
            The metrics of `play` in expectation; ``row_payoff`` and ``column_payoff``, expected payoffs a round;
            ``nash_conv``, the sum of what each seat would gain a round by a best response to the other (Lanctot et
            al., 2017), 0 in equilibrium. A best response may look back further than `memory`; against an opponent
            that does not, that gains it nothing.

        Raises:
            ScenarioError: rounds and memory give too many histories to ask about.
        """
        asked_after = histories(self.game, self.options.rounds, self.options.memory)
        asked = {(s, h): self.question(s, h, table.language) for h in asked_after for s in (ROW, COLUMN)}
        policies: dict[SeatId, dict[History, Sequence[float]]] = {ROW: {}, COLUMN: {}}
        for (seat, history), probabilities in (await distributions(table, asked)).items():
            policies[seat][history] = probabilities
        horizon = (self.options.rounds, self.options.memory)
        frequencies = occupancy(self.game, policies[ROW], policies[COLUMN], *horizon)
        row, column = self.game.expected(frequencies)
        return {
            **self._metrics(frequencies),
            "row_payoff": row,
            "column_payoff": column,
            "nash_conv": nash_conv(self.game, policies[ROW], policies[COLUMN], *horizon),
        }

    def question(self, seat: SeatId, history: History, language: str) -> Question:
        """What `seat` is asked after the remembered rounds `history`."""
        return Question(seat, self.shown(seat, history, language), self.choices(seat, language))

    def shown(self, seat: SeatId, history: History, language: str) -> Observation:
        """What `seat` sees after the remembered rounds `history`; its own words and points always come first."""
        key = (seat, history, language)
        found = self._observations.get(key)
        if found is None:  # there are few, and thousands of episodes ask for them
            found = self._observations[key] = self._shown(seat, history, language)
        return found

    def _shown(self, seat: SeatId, history: History, language: str) -> Observation:
        text = _PROMPTS[language]
        words = self._words(language)
        player, flip = (0, 1) if seat == ROW else (1, -1)
        lines = [text["points"]]
        for own in range(self.game.shape[player]):
            for other in range(self.game.shape[1 - player]):
                i, j = (own, other)[::flip]
                mine, theirs = self.game.payoffs[i][j][::flip]
                lines.append(f"{words[own]} {words[other]} {mine:.12g} {theirs:.12g}")
        if history:
            pairs = (f"{words[own]} {words[other]}" for own, other in (pair[::flip] for pair in history))
            lines.append(text["history"] + ", ".join(pairs))
        return Observation(system=text["system"], user="\n".join(lines), prefix=text["prefix"])

    def choices(self, seat: SeatId, language: str) -> tuple[str, ...]:
        """The words `seat` chooses among, in the order of its actions."""
        own = self.game.shape[0 if seat == ROW else 1]
        return self._words(language)[:own]

    def _words(self, language: str) -> tuple[str, ...]:
        return self.options.labels or LABELS[language]

    def _metrics(self, frequencies: Mapping[JointAction, float]) -> dict[str, float]:
        """Of how often each joint action is played; the shares sum to 1."""
        metrics = {}
        for player, seat in enumerate((ROW, COLUMN)):
            for action in range(self.game.shape[player]):
                share = sum(p for pair, p in frequencies.items() if pair[player] == action)
                metrics[f"{seat}_{self.game.actions[action]}"] = share
        cooperative = self.game.cooperative
        if cooperative is not None:
            name = self.game.actions[cooperative]
            metrics["cooperation"] = (metrics[f"{ROW}_{name}"] + metrics[f"{COLUMN}_{name}"]) / 2
        metrics["joint_payoff"] = sum(self.game.expected(frequencies))
        best = self.game.best_joint_payoff
        if best > 0:
            metrics["efficiency"] = metrics["joint_payoff"] / best
        return metrics

    def _scripts(self) -> dict[str, Script]:
        rows, columns = self.game.shape
        scripts: dict[str, Script] = {
            f"always_{name}": _always(action) for action, name in enumerate(self.game.actions[: min(rows, columns)])
        }
        scripts["random"] = at_random
        if rows == columns and (self.options.memory > 0 or self.options.rounds == 1):
            scripts["tit_for_tat"] = _tit_for_tat
        return scripts


def _always(action: int) -> Script:
    def answer(observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
        return choices[action]

    return answer


def _tit_for_tat(observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """Reads what the other did last off the last word shown, as any player would have to."""
    past = observation.user.splitlines()[-1]
    if not past.startswith(tuple(text["history"] for text in _PROMPTS.values())):
        return choices[0]
    return past.split()[-1]


def _bimatrix(options: MatrixOptions) -> Bimatrix:
    """The game these options name or spell out. Raises `ValueError` saying what is wrong with the payoffs."""
    if options.payoffs is None:
        return GAMES[options.game or "prisoners_dilemma"]
    rows, columns = len(options.payoffs), len(options.payoffs[0]) if options.payoffs else 0
    if rows < 2 or columns < 2:
        raise ValueError(f"payoffs has {rows} rows and {columns} columns; each player needs at least two actions")
    uneven = [i for i, row in enumerate(options.payoffs) if len(row) != columns]
    if uneven:
        raise ValueError(f"payoffs[{uneven[0]}] has {len(options.payoffs[uneven[0]])} entries, payoffs[0] {columns}")
    every = [payoff for row in options.payoffs for pair in row for payoff in pair]
    if not all(math.isfinite(payoff) for payoff in every):
        raise ValueError("payoffs must be finite numbers")
    if min(every) == max(every):
        raise ValueError("all payoffs are the same; there is nothing to play for")
    actions = options.actions or tuple(f"a{i}" for i in range(1, max(rows, columns) + 1))
    if len(actions) != max(rows, columns):
        raise ValueError(f"actions has {len(actions)} names, the game has {max(rows, columns)} actions")
    if len(set(actions)) < len(actions) or not all(re.fullmatch(r"\w+", name) for name in actions):
        raise ValueError("actions must be different single words of letters, digits or '_'")
    return Bimatrix("own", actions, options.payoffs)
