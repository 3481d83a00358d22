"""A common-pool resource: what is left grows back, what is taken is gone.

    stock = capacity; each round, while there is stock:
        every player demands h_i, all at the same time
        if the demands sum to more than the stock, each gets the same fraction of its demand, or, where `scarcity`
        is "queue", players are served in random order, each all that it asked for while there is any
        stock <- min(capacity, floor(growth * (stock - taken)))
    score = what a player took, by the most one player could take if the others took as little as they can

With the default settings (three players, capacity 6, demands of 0 to 2, doubling) one each keeps the stock for ever
and two each empty it at once: the tragedy of the commons (Hardin, 1968; Ostrom, 1990). Which of the two comes about
is the mode's business. In a queue greed also makes unequal: who comes last finds nothing. Figures are those of Perolat
et al., "A multi-agent reinforcement learning model of common-pool resource appropriation" (2017, arXiv 1707.06600):
efficiency, equality, sustainability.

The pool is one task without further content (`single_task`). Players see the stock alone, not the number of the round,
so there are as few prompts as levels of the stock, and play is a Markov chain over them that `exact` follows without
sampling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations, product
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.welfare import alike, equality, normalised
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

Policy = Mapping[int, Sequence[float]]
"""Probabilities of each demand at every level of the stock."""
Takes = tuple[float, ...]
"""What each player has taken."""

MAX_STATES: Final = 400_000
"""Most (stock, taken so far) an exact computation follows in one round."""

_PROMPTS: Final = {
    "en": {
        "system": "Take {demands} from the stock. What is left grows.",
        "stock": "Stock: {stock}",
        "queue": " First come, first served.",
        "prefix": "Take:",
    },
    "zh": {
        "system": "从存量中拿{demands}。剩下的会增长。",
        "stock": "存量：{stock}",
        "queue": "先到先得。",
        "prefix": "拿：",
    },
}


class CommonsOptions(ScenarioOptions):
    """Settings of the common pool."""

    players: int = Field(default=3, ge=2, le=6)
    """Seats: "player_1", "player_2", …"""
    capacity: int = Field(default=6, ge=2, le=100)
    """Units of stock at the start, and the most there can be."""
    demands: tuple[int, ...] = (0, 1, 2)
    """Units a player may ask for in a round, in rising order."""
    growth: float = Field(default=2.0, ge=1, le=10)
    """What is left is multiplied by this, rounded down, up to the capacity."""
    scarcity: Literal["share", "queue"] = "share"
    """Who gets what when more is asked for than there is: each the same fraction, or who comes first, in an order drawn
    anew each time, all it asked for while there is any."""
    rounds: int = Field(default=6, ge=2, le=20)
    """In an episode; it ends earlier when nothing is left."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @field_validator("demands")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or list(value) != sorted(set(value)) or value[0] < 0:
            raise ValueError("needs at least two different whole numbers of at least 0, in rising order")
        return value

    @model_validator(mode="after")
    def _fits(self) -> CommonsOptions:
        if self.demands[0] * self.players >= self.capacity:
            raise ValueError(
                f"{self.players} players with demands of at least {self.demands[0]} empty a stock of {self.capacity} "
                f"in one round whatever they do; raise capacity or allow a smaller demand"
            )
        return self


class Commons:
    """Players "player_1", "player_2", … take from one stock, `rounds` times.

    Metrics, of `play` and in expectation of `exact` alike:

    ``efficiency``: all that was taken, by the most that could have been taken (by players who know when it ends);
    ``equality``: 1 - Gini of what the players took, 1 where nobody took anything;
    ``sustainability``: the mean number of the rounds a player took something in, by `rounds`, averaged over players:
    (rounds + 1) / (2 rounds) when all take to the end, 1 / rounds when everything goes in the first round;
    ``survival``: whether any stock is left at the end;
    ``stock``: mean share of the capacity there is at the start of a round.

    Scripts: ``least``, ``most``, ``random``, and ``share``, which asks for an equal share of what grows back.
    """

    Options = CommonsOptions
    single_task = True

    def __init__(self, options: CommonsOptions) -> None:
        self.options = options
        self.players = [f"player_{i}" for i in range(1, options.players + 1)]
        self.scripts: Mapping[str, Script] = {
            "least": lambda seen, choices, rng: choices[0],
            "most": lambda seen, choices, rng: choices[-1],
            "random": at_random,
            "share": lambda seen, choices, rng: self._fair(seen),
        }
        self._outcomes: dict[tuple[int, tuple[int, ...]], list[tuple[Takes, float]]] = {}
        self.best_total = self._most(options.players)
        """The most all players together can take in an episode."""
        self.best_single = self._most(1)
        """The most one player can take if the others demand as little as they can."""

    # -- the rules ------------------------------------------------------------------------------------------------

    def served(self, stock: int, demands: Sequence[int], order: Sequence[int]) -> Takes:
        """What each player gets of its demand. `order`: who is served before whom, where that matters."""
        total = sum(demands)
        if total <= stock:
            return tuple(float(demand) for demand in demands)
        if self.options.scarcity == "share":
            return tuple(stock * demand / total for demand in demands)
        takes = [0.0] * len(demands)
        for player in order:
            takes[player] = float(min(demands[player], stock))
            stock -= min(demands[player], stock)
        return tuple(takes)

    def outcomes(self, stock: int, demands: tuple[int, ...]) -> list[tuple[Takes, float]]:
        """Everything the players may get, and how likely that is."""
        known = self._outcomes.get((stock, demands))
        if known is None:
            everybody = range(len(demands))
            drawn = self.options.scarcity == "queue" and sum(demands) > stock
            found = Counter(self.served(stock, demands, o) for o in (permutations(everybody) if drawn else [everybody]))
            known = [(takes, count / found.total()) for takes, count in found.items()]
            self._outcomes[stock, demands] = known
        return known

    def grown(self, stock: int, demanded: int) -> int:
        """The stock of the next round."""
        return min(self.options.capacity, math.floor(self.options.growth * max(0, stock - demanded) + 1e-9))

    def _most(self, players: int) -> float:
        """The most this many players take together while the others demand the least, by backward induction; who comes
        first, where there is a queue."""
        o = self.options
        others = o.demands[0] * (o.players - players)
        sums = sorted({sum(demands) for demands in product(o.demands, repeat=players)})

        @cache
        def best(left: int, stock: int) -> float:
            if not left or not stock:
                return 0.0
            found = 0.0
            for demand in sums:
                total = demand + others
                fraction = min(1.0, stock / total) if total else 0.0
                taken = demand * fraction if o.scarcity == "share" else min(demand, stock)
                found = max(found, taken + best(left - 1, self.grown(stock, total)))
            return found

        return best(o.rounds, o.capacity)

    # -- playing --------------------------------------------------------------------------------------------------

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """The one task: endlessly for TRAIN, once for HELDOUT."""
        o = self.options
        task = TrainingTask(
            task_id=f"commons-{o.players}",
            task_type=TaskType.COLLABORATION,
            reward_pool=o.reward_pool,
            max_steps=o.rounds,
            required_models=o.players,
            cooperation_level=o.cooperation_level,
            content={"capacity": o.capacity, "growth": o.growth, "rounds": o.rounds},
            split=split,
        )
        return repeated(task)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return alike(self.players)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        o = self.options
        stock, levels = o.capacity, [0.0] * o.rounds
        taken: list[Takes] = []
        for number in range(o.rounds):
            if not stock:
                break
            levels[number] = stock / o.capacity
            asked = [self.question(i, stock, table.language) for i in range(o.players)]
            demands = [o.demands[choice] for choice in await choose(table, asked, "move")]
            order = table.rng.sample(range(o.players), o.players) if o.scarcity == "queue" else range(o.players)
            taken.append(self.served(stock, demands, order))
            stock = self.grown(stock, sum(demands))
        totals = [math.fsum(takes) for takes in zip(*taken, strict=True)]
        times = [_mean_time([n for n, takes in enumerate(taken, start=1) if takes[i]]) for i in range(o.players)]
        return Outcome(
            scores={s: normalised(total, 0.0, self.best_single) for s, total in zip(self.players, totals, strict=True)},
            metrics={
                "efficiency": math.fsum(totals) / self.best_total,
                "equality": equality(totals),
                "sustainability": math.fsum(times) / (o.players * o.rounds),
                "survival": float(stock > 0),
                "stock": math.fsum(levels) / o.rounds,
            },
        )

    def question(self, player: int, stock: int, language: str) -> Question:
        """What a player sees of a stock; the same for all players."""
        text = _PROMPTS[language]
        words = tuple(str(demand) for demand in self.options.demands)
        listed = (", " if language == "en" else "、").join(words)
        shown = Observation(
            system=text["system"].format(demands=listed) + (text["queue"] if self.options.scarcity == "queue" else ""),
            user=text["stock"].format(stock=stock),
            prefix=text["prefix"],
        )
        return Question(self.players[player], shown, words)

    def _fair(self, seen: Observation) -> str:
        """The greatest demand that, made by all, leaves enough to grow back to what there was; or else the least."""
        stock = int("".join(filter(str.isdigit, seen.user)))
        o = self.options
        kept = [d for d in o.demands if self.grown(stock, d * o.players) >= stock]
        return str(kept[-1] if kept else o.demands[0])

    # -- exactly --------------------------------------------------------------------------------------------------

    async def exact(self, table: Table) -> dict[str, float]:
        """Expected metrics of the policies at `table`, and how far they are from equilibrium; no sampling.

        Returns:
            The metrics of `play` in expectation; ``<seat>_taken``, what each is expected to take; ``nash_conv``, the
            sum over players of what each would take more in an episode by a best response to the others' policies
            (Lanctot et al., 2017), 0 in equilibrium. The best response knows the number of the round, as its rivals'
            policies do not.

        Raises:
            ScenarioError: there are too many ways to take from the stock.
        """
        o = self.options
        asked = {(i, s): self.question(i, s, table.language) for i in range(o.players) for s in self.levels()}
        answers = await distributions(table, asked)
        policies = [{s: answers[i, s] for s in self.levels()} for i in range(o.players)]
        ends, levels, survival = self.ends(policies)
        totals = [math.fsum(p * takes[i] for takes, p in ends.items()) for i in range(o.players)]
        times = [self._time(i, policies) for i in range(o.players)]
        gains = [self.best_response(i, policies) - totals[i] for i in range(o.players)]
        return {
            "efficiency": math.fsum(totals) / self.best_total,
            "equality": math.fsum(p * equality(takes) for takes, p in ends.items()),
            "sustainability": math.fsum(times) / (o.players * o.rounds),
            "survival": survival,
            "stock": levels,
            **{f"{seat}_taken": total for seat, total in zip(self.players, totals, strict=True)},
            "nash_conv": math.fsum(max(0.0, gain) for gain in gains),  # rounding may leave -1e-17
        }

    def levels(self) -> list[int]:
        """Every level of the stock at which players may be asked, highest first."""
        found, new = {self.options.capacity}, [self.options.capacity]
        sums = {sum(demands) for demands in product(self.options.demands, repeat=self.options.players)}
        while new:
            stock = new.pop()
            following = {self.grown(stock, demanded) for demanded in sums} - found - {0}
            found |= following
            new.extend(following)
        return sorted(found, reverse=True)

    def ends(self, policies: Sequence[Policy]) -> tuple[dict[Takes, float], float, float]:
        """Probability of everything the players may have taken in the end; expected mean share of the capacity at the
        start of a round; probability that stock is left.

        Raises:
            ScenarioError: more than `MAX_STATES` have to be followed.
        """
        o = self.options
        moves = self._all_moves(policies)
        reached: dict[tuple[int, Takes], float] = {(o.capacity, (0.0,) * o.players): 1.0}
        levels = 0.0
        for _ in range(o.rounds):
            following: dict[tuple[int, Takes], float] = {}
            for (stock, takes), probability in reached.items():
                levels += probability * stock / (o.capacity * o.rounds)
                for demands, chance in moves[stock]:
                    for new, share in self.outcomes(stock, demands):
                        got = tuple(a + b for a, b in zip(takes, new, strict=True))
                        then = (self.grown(stock, sum(demands)), got)
                        following[then] = following.get(then, 0.0) + probability * chance * share
            if len(following) > MAX_STATES:
                raise ScenarioError(
                    f"commons: {o.players} players and {o.rounds} rounds give too many outcomes to compute exactly; "
                    f"lower one of them or the demands, or measure by playing episodes"
                )
            reached = following
        ends: dict[Takes, float] = {}
        for (_, takes), probability in reached.items():
            ends[takes] = ends.get(takes, 0.0) + probability
        return ends, levels, math.fsum(p for (stock, _), p in reached.items() if stock)

    def best_response(self, player: int, policies: Sequence[Policy]) -> float:
        """The most `player` can take in an episode, in expectation, while the others keep to their policies."""
        o = self.options

        @cache
        def best_from(played: int, stock: int) -> float:
            if played == o.rounds or not stock:
                return 0.0
            found = []
            for own in range(len(o.demands)):
                alone = [*policies]
                alone[player] = {stock: [float(k == own) for k in range(len(o.demands))]}
                found.append(
                    math.fsum(
                        chance * (self._expected(player, stock, d) + best_from(played + 1, self.grown(stock, sum(d))))
                        for d, chance in self._moves(stock, alone)
                    )
                )
            return max(found)

        return best_from(0, o.capacity)

    def _expected(self, player: int, stock: int, demands: tuple[int, ...]) -> float:
        return math.fsum(chance * takes[player] for takes, chance in self.outcomes(stock, demands))

    def _moves(self, stock: int, policies: Sequence[Policy]) -> list[tuple[tuple[int, ...], float]]:
        """What the players may demand at this stock, and how likely that is; impossible ones left out."""
        found = []
        for choices in product(range(len(self.options.demands)), repeat=self.options.players):
            chance = math.prod(policies[i][stock][choice] for i, choice in enumerate(choices))
            if chance:
                found.append((tuple(self.options.demands[choice] for choice in choices), chance))
        return found

    def _all_moves(self, policies: Sequence[Policy]) -> dict[int, list[tuple[tuple[int, ...], float]]]:
        """`_moves` at every level; nobody demands anything of an empty stock."""
        nothing = [((0,) * self.options.players, 1.0)]
        return {0: nothing, **{stock: self._moves(stock, policies) for stock in self.levels()}}

    def _time(self, player: int, policies: Sequence[Policy]) -> float:
        """Expected mean number of the rounds `player` takes something in; 0 for an episode where it takes nothing."""
        o = self.options
        moves = self._all_moves(policies)
        reached: dict[tuple[int, int, int], float] = {(o.capacity, 0, 0): 1.0}  # stock, sum of the rounds, how many
        for number in range(1, o.rounds + 1):
            following: dict[tuple[int, int, int], float] = {}
            for (stock, total, count), probability in reached.items():
                for demands, chance in moves[stock]:
                    for got, share in self.outcomes(stock, demands):
                        takes = int(got[player] > 0)
                        then = (self.grown(stock, sum(demands)), total + takes * number, count + takes)
                        following[then] = following.get(then, 0.0) + probability * chance * share
            reached = following
        return math.fsum(p * total / count for (_, total, count), p in reached.items() if count)


def _mean_time(rounds: Sequence[int]) -> float:
    return math.fsum(rounds) / len(rounds) if rounds else 0.0
