"""The linear public goods game: what is given is multiplied and shared by all, whoever gave it.

    each round: player i has e_i points and gives c_i of them, all at the same time
    payoff of i = e_i - c_i + multiplier * (c_1 + ... + c_n) / n
    score = mean payoff over the rounds, moved to [0, 1] by the least and the greatest payoff of a round, for all alike

A point given returns multiplier / n to its giver and multiplier to all. With 1 < multiplier < n giving nothing is each
one's best answer to anything (the only Nash equilibrium), and giving all is best for all (Ledyard, 1995, in Kagel and
Roth, The Handbook of Experimental Economics). The prompt gives the rule and no advice; what is played for is the
mode's business, through the reward. Players may begin unequal (`endowment` = [2, 3, 4]): giving all then makes them
equal too, and giving nothing leaves them as they were (Hauser et al., "Social dilemmas among unequals", Nature 2019).

The game is one task without further content (`single_task`). A player sees its own and the others' gifts of the last
`memory` rounds, the others' in order of size, so players with equal points are alike, and the game is a Markov chain
over those rounds: `exact` follows it together with the sums given so far, without sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.welfare import alike, equality, normalised
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

Gifts = tuple[int, ...]
"""What each player gave in a round."""
History = tuple[Gifts, ...]
"""Remembered rounds, oldest first."""
Policy = Mapping[History, Sequence[float]]
"""Probabilities of giving 0, 1, … after each history."""

MAX_STEPS: Final = 200_000
"""Most (history, gifts of all) an exact computation goes through for one round."""
MAX_CELLS: Final = 500_000_000
"""Most (history, gifts of all, sums given so far) it goes through for one round."""

_PROMPTS: Final = {
    "en": {
        "system": "You have {endowment} points. Points given are multiplied by {multiplier} and shared by all "
        "{players}. Give 0 to {endowment}.",
        "start": "First round.",
        "round": "You gave {own}, others {others}.",
        "prefix": "Give:",
    },
    "zh": {
        "system": "你有{endowment}分。给出的分乘以{multiplier}，由{players}人平分。给0到{endowment}分。",
        "start": "第一轮。",
        "round": "你给{own}，其他人给{others}。",
        "prefix": "给：",
    },
}


Points = Annotated[int, Field(ge=1, le=9)]


class PublicGoodsOptions(ScenarioOptions):
    """Settings of the public goods game."""

    players: int = Field(default=3, ge=2, le=8)
    """Seats: "player_1", "player_2", …"""
    endowment: Points | tuple[Points, ...] = 3
    """Points of every player in every round, or a list with one number, 1 to 9, for each player. It may give any whole
    number of them."""
    multiplier: float = Field(default=2.0, gt=0, le=100, allow_inf_nan=False)
    """What the points given are multiplied by before all share them; a dilemma between 1 and `players`."""
    rounds: int = Field(default=1, ge=1, le=20)
    """Times the game is played in one episode; how many are left is not shown."""
    memory: int = Field(default=1, ge=0, le=3)
    """Past rounds a player is shown; matters from the second round on."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @model_validator(mode="after")
    def _one_for_each(self) -> PublicGoodsOptions:
        if isinstance(self.endowment, tuple) and len(self.endowment) != self.players:
            raise ValueError(
                f"endowment has {len(self.endowment)} numbers for {self.players} players; give one number "
                f"for all or one for each"
            )
        return self


class PublicGoods:
    """Players "player_1", "player_2", … give at the same time, `rounds` times.

    Metrics, of `play` and in expectation of `exact` alike: ``contribution``, the share of all points that was given;
    ``efficiency``, the sum of all payoffs by the greatest possible; ``equality``, 1 - Gini of the payoffs of the
    episode; ``<seat>_contribution``.

    Scripts: ``give_all``, ``give_nothing``, ``random``.
    """

    Options = PublicGoodsOptions
    single_task = True

    def __init__(self, options: PublicGoodsOptions) -> None:
        self.options = options
        self.players = [f"player_{i}" for i in range(1, options.players + 1)]
        given = options.endowment
        self.points = given if isinstance(given, tuple) else (given,) * options.players
        """Of each player, in a round."""
        self.scripts: Mapping[str, Script] = {
            "give_all": lambda seen, choices, rng: choices[-1],
            "give_nothing": lambda seen, choices, rng: choices[0],
            "random": at_random,
        }

    # -- the rules ------------------------------------------------------------------------------------------------

    def payoff(self, player: int, own: float, total: float, rounds: int = 1) -> float:
        """Points of a player that gave `own` of the `total` given in `rounds` rounds."""
        o = self.options
        return rounds * self.points[player] - own + o.multiplier * total / o.players

    def payoffs(self, given: Sequence[float], rounds: int = 1) -> list[float]:
        """Of all players, by what each gave in `rounds` rounds."""
        total = math.fsum(given)
        return [self.payoff(player, own, total, rounds) for player, own in enumerate(given)]

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest payoff of one player in one round."""
        corners = [
            self.payoff(player, own, own + others)
            for player, points in enumerate(self.points)
            for own in (0, points)
            for others in (0, sum(self.points) - points)
        ]
        return min(corners), max(corners)

    @property
    def nash_contribution(self) -> float:
        """The share given where everybody answers everybody best: 0 in a dilemma."""
        return float(self.options.multiplier > self.options.players)

    @property
    def best_total(self) -> float:
        """The greatest sum of all payoffs in one round."""
        return sum(self.points) * max(1.0, self.options.multiplier)

    # -- playing --------------------------------------------------------------------------------------------------

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """The one task: endlessly for TRAIN, once for HELDOUT."""
        o = self.options
        task = TrainingTask(
            task_id=f"public-goods-{o.players}",
            task_type=TaskType.COLLABORATION,
            reward_pool=o.reward_pool,
            max_steps=o.rounds,
            required_models=o.players,
            cooperation_level=o.cooperation_level,
            content={"endowment": list(self.points), "multiplier": o.multiplier, "rounds": o.rounds},
            split=split,
        )
        return repeated(task)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return alike(self.players, self.points)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        o = self.options
        rounds: History = ()
        for _ in range(o.rounds):
            asked = [self.question(i, self._remembered(rounds), table.language) for i in range(o.players)]
            rounds = (*rounds, tuple(await choose(table, asked, "move")))
        given = [sum(gifts) for gifts in zip(*rounds, strict=True)]
        payoffs = self.payoffs(given, o.rounds)
        low, high = self.bounds
        scores = {seat: normalised(p / o.rounds, low, high) for seat, p in zip(self.players, payoffs, strict=True)}
        shares = [own / (o.rounds * points) for own, points in zip(given, self.points, strict=True)]
        return Outcome(scores=scores, metrics=self._metrics(shares, equality(payoffs)))

    def question(self, player: int, history: History, language: str) -> Question:
        """What a player sees after the remembered rounds `history`: its own gift first, then the others' by size."""
        o, text = self.options, _PROMPTS[language]
        points = self.points[player]
        names = {"endowment": points, "multiplier": f"{o.multiplier:.12g}", "players": o.players}
        rounds = []
        for gifts in history:
            others = " ".join(str(gift) for gift in sorted(gifts[:player] + gifts[player + 1 :]))
            rounds.append(text["round"].format(own=gifts[player], others=others))
        shown = Observation(
            system=text["system"].format(**names),
            user="\n".join(rounds) or text["start"],
            prefix=text["prefix"],
        )
        return Question(self.players[player], shown, tuple(str(gift) for gift in range(points + 1)))

    # -- exactly --------------------------------------------------------------------------------------------------

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table`, and how far they are from equilibrium; no sampling.

        Returns:
            The metrics of `play` in expectation; ``nash_conv``, the sum of what each player would gain a round by a
            best response to the others (Lanctot et al., 2017), in points, 0 in equilibrium;
            ``nash_contribution``, the share given in the equilibrium of the game played once.

        Raises:
            ScenarioError: players, rounds and memory give too much to go through.
        """
        after = self._histories()
        asked = {(i, h): self.question(i, h, table.language) for h in after for i in range(self.options.players)}
        answers = await distributions(table, asked)
        policies = [{h: answers[i, h] for h in after} for i in range(self.options.players)]
        shares, fairness = self.expected(policies)
        gains = [self._gain(i, policies, shares) for i in range(self.options.players)]
        return {
            **self._metrics(shares, fairness),
            "nash_conv": sum(max(0.0, gain) for gain in gains),  # rounding may leave -1e-17
            "nash_contribution": self.nash_contribution,
        }

    def expected(self, policies: Sequence[Policy]) -> tuple[list[float], float]:
        """Expected share of its points each player gives, and expected equality of an episode's payoffs."""
        o = self.options
        reached = self._sums(policies)
        shares, fairness = [0.0] * o.players, 0.0
        for given in zip(*np.nonzero(reached), strict=True):
            probability, sums = float(reached[given]), [int(own) for own in given]
            for i, own in enumerate(sums):
                shares[i] += probability * own / (o.rounds * self.points[i])
            fairness += probability * equality(self.payoffs(sums, o.rounds))
        return shares, fairness

    def best_response(self, player: int, policies: Sequence[Policy]) -> float:
        """The most `player` can earn a round, in expectation, against the others' fixed policies.

        By backward induction over (round, history); the others see no more than that, so remembering more gains
        nothing.
        """
        others = [i for i in range(self.options.players) if i != player]

        @cache
        def theirs(history: History) -> list[tuple[Gifts, float]]:
            """What the others may give, and how likely that is."""
            found = []
            for gifts in product(*(range(self.points[i] + 1) for i in others)):
                chances = (policies[i][history][gift] for i, gift in zip(others, gifts, strict=True))
                found.append((gifts, math.prod(chances)))
            return found

        @cache
        def best_from(played: int, history: History) -> float:
            if played == self.options.rounds:
                return 0.0
            return max(
                math.fsum(
                    probability
                    * (
                        self.payoff(player, own, own + sum(gifts))
                        + best_from(played + 1, self._remembered((*history, (*gifts[:player], own, *gifts[player:]))))
                    )
                    for gifts, probability in theirs(history)
                )
                for own in range(self.points[player] + 1)
            )

        return best_from(0, ()) / self.options.rounds

    def _gain(self, player: int, policies: Sequence[Policy], shares: Sequence[float]) -> float:
        given = [share * points for share, points in zip(shares, self.points, strict=True)]
        return self.best_response(player, policies) - self.payoffs(given)[player]

    def _sums(self, policies: Sequence[Policy]) -> NDArray[np.float64]:
        """Probability of every combination of sums given in an episode: (sums of player 1, …, sums of player n)."""
        o = self.options
        start = np.zeros([o.rounds * points + 1 for points in self.points])
        start[(0,) * o.players] = 1.0
        reached: dict[History, NDArray[np.float64]] = {(): start}
        for _ in range(o.rounds):
            following: dict[History, NDArray[np.float64]] = {}
            for history, sums in reached.items():
                for gifts in product(*(range(points + 1) for points in self.points)):
                    weight = math.prod(policies[i][history][gift] for i, gift in enumerate(gifts))
                    if weight == 0.0:
                        continue
                    then = self._remembered((*history, gifts))
                    total = following.setdefault(then, np.zeros_like(start))
                    width = [size - gift for size, gift in zip(start.shape, gifts, strict=True)]
                    source = tuple(slice(0, w) for w in width)
                    target = tuple(slice(gift, None) for gift in gifts)
                    total[target] += weight * sums[source]
            reached = following
        return np.sum(list(reached.values()), axis=0)  # type: ignore[no-any-return]

    def _histories(self) -> list[History]:
        """Every history a player may be shown, shortest first. Raises `ScenarioError` when there is too much."""
        o = self.options
        joint = math.prod(points + 1 for points in self.points)
        longest = min(o.memory, o.rounds - 1)
        count = sum(joint**length for length in range(longest + 1))
        cells = count * joint * math.prod(o.rounds * points + 1 for points in self.points)
        if count * joint > MAX_STEPS or cells > MAX_CELLS:
            raise ScenarioError(
                f"public_goods: {o.players} players, {o.rounds} rounds and memory {o.memory} are too many to compute "
                f"exactly; lower one of them or the endowment, or measure by playing episodes"
            )
        gifts = list(product(*(range(points + 1) for points in self.points)))
        return [history for length in range(longest + 1) for history in product(gifts, repeat=length)]

    def _remembered(self, rounds: History) -> History:
        return rounds[max(0, len(rounds) - self.options.memory) :]

    def _metrics(self, shares: Sequence[float], fairness: float) -> dict[str, float]:
        """Of the share of its points each player gave, and of the equality of the payoffs."""
        o = self.options
        everything = sum(self.points)
        given = math.fsum(share * points for share, points in zip(shares, self.points, strict=True))
        return {
            "contribution": given / everything,
            "efficiency": (everything + (o.multiplier - 1) * given) / self.best_total,
            "equality": fairness,
            **{f"{seat}_contribution": share for seat, share in zip(self.players, shares, strict=True)},
        }
