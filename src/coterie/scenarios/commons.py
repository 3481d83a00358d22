"""A common-pool resource: what is left grows back, what is taken is gone.

    stock = capacity; each round, while there is stock:
        every player demands h_i, all at the same time
        if the demands sum to more than the stock, each gets the same fraction of its demand
        stock <- min(capacity, floor(growth * (stock - taken)))
    score = what a player took, by the most one player could take if the others took as little as they can

With the default settings (three players, capacity 6, demands of 0 to 2, doubling) one each keeps the stock for ever
and two each empty it at once: the tragedy of the commons (Hardin, 1968; Ostrom, 1990). Which of the two comes about
is the mode's business. Players may be unequal, each with `demands` of its own; then greed makes unequal too. Figures
are those of Perolat et al., "A multi-agent reinforcement learning model of common-pool resource appropriation" (2017,
arXiv 1707.06600): efficiency, equality, sustainability.

The pool is one task without further content (`single_task`). Players see the stock alone, not the number of the round,
so there are as few prompts as levels of the stock, and play is a Markov chain over them that `exact` follows without
sampling.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Final

from pydantic import Field, model_validator

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, choose, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.welfare import alike, equality, normalised
from coterie.types import Observation, Outcome, Seat, Split, TaskType, TrainingTask

Policy = Mapping[int, Sequence[float]]
"""Probabilities of each demand at every level of the stock."""
Takes = tuple[float, ...]
"""What each player has taken so far."""

MAX_STATES: Final = 400_000
"""Most (stock, taken so far) an exact computation follows in one round."""

_PROMPTS: Final = {
    "en": {
        "system": "Take {demands} from the stock. What is left grows.",
        "stock": "Stock: {stock}",
        "prefix": "Take:",
    },
    "zh": {"system": "从存量中拿{demands}。剩下的会增长。", "stock": "存量：{stock}", "prefix": "拿："},
}


class CommonsOptions(ScenarioOptions):
    """Settings of the common pool."""

    players: int = Field(default=3, ge=2, le=6)
    """Seats: "player_1", "player_2", …"""
    capacity: int = Field(default=6, ge=2, le=100)
    """Units of stock at the start, and the most there can be."""
    demands: tuple[int, ...] | tuple[tuple[int, ...], ...] = (0, 1, 2)
    """Units a player may ask for in a round, in rising order, or a list with one such list for each player."""
    growth: float = Field(default=2.0, ge=1, le=10)
    """What is left is multiplied by this, rounded down, up to the capacity."""
    rounds: int = Field(default=6, ge=2, le=20)
    """In an episode; it ends earlier when nothing is left."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""

    @model_validator(mode="after")
    def _fits(self) -> CommonsOptions:
        own = self.of_each()
        if len(own) != self.players:
            raise ValueError(
                f"demands has {len(own)} lists for {self.players} players; give one list for all or one for each"
            )
        if any(len(asked) < 2 or list(asked) != sorted(set(asked)) or asked[0] < 0 for asked in own):
            raise ValueError("demands needs two or more different whole numbers of at least 0, in rising order")
        least = sum(demands[0] for demands in own)
        if least >= self.capacity:
            raise ValueError(
                f"{self.players} players who ask for at least {least} together empty a stock of {self.capacity} in one "
                f"round whatever they do; raise capacity or allow a smaller demand"
            )
        return self

    def of_each(self) -> tuple[tuple[int, ...], ...]:
        """What each player may ask for."""
        lists = [asked for asked in self.demands if isinstance(asked, tuple)]
        numbers = [asked for asked in self.demands if isinstance(asked, int)]
        return tuple(lists) if lists else (tuple(numbers),) * self.players


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
            "share": lambda seen, choices, rng: self._fair(seen, choices),
        }
        self.demands = options.of_each()
        """What each player may ask for."""
        everybody = range(options.players)
        self.best_total = self._most(everybody)
        """The most all players together can take in an episode."""
        self.best_single = max(self._most([player]) for player in everybody)
        """The most one player can take if the others demand as little as they can."""

    # -- the rules ------------------------------------------------------------------------------------------------

    def shares(self, stock: int, demands: Sequence[int]) -> list[float]:
        """What each player gets of its demand."""
        total = sum(demands)
        return [float(d) for d in demands] if total <= stock else [stock * d / total for d in demands]

    def grown(self, stock: int, demanded: int) -> int:
        """The stock of the next round."""
        return min(self.options.capacity, math.floor(self.options.growth * max(0, stock - demanded) + 1e-9))

    def _most(self, players: Collection[int]) -> float:
        """The most these players take together while the others demand the least, by backward induction."""
        o = self.options
        others = sum(demands[0] for player, demands in enumerate(self.demands) if player not in players)
        sums = sorted({sum(asked) for asked in product(*(self.demands[player] for player in players))})

        @cache
        def best(left: int, stock: int) -> float:
            if not left or not stock:
                return 0.0
            found = 0.0
            for demand in sums:
                total = demand + others
                taken = demand * min(1.0, stock / total) if total else 0.0
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
        return alike(self.players, self.demands)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        o = self.options
        stock, levels = o.capacity, [0.0] * o.rounds
        taken: list[list[float]] = []
        for number in range(o.rounds):
            if not stock:
                break
            levels[number] = stock / o.capacity
            asked = [self.question(i, stock, table.language) for i in range(o.players)]
            demands = [self.demands[i][choice] for i, choice in enumerate(await choose(table, asked, "move"))]
            taken.append(self.shares(stock, demands))
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
        """What a player sees of a stock; the same for all players with the same demands."""
        text = _PROMPTS[language]
        words = tuple(str(demand) for demand in self.demands[player])
        listed = (", " if language == "en" else "、").join(words)
        shown = Observation(
            system=text["system"].format(demands=listed),
            user=text["stock"].format(stock=stock),
            prefix=text["prefix"],
        )
        return Question(self.players[player], shown, words)

    def _fair(self, seen: Observation, choices: Sequence[str]) -> str:
        """The greatest demand that, made by all, leaves enough to grow back to what there was; or else the least."""
        stock = int("".join(filter(str.isdigit, seen.user)))
        kept = [d for d in map(int, choices) if self.grown(stock, d * self.options.players) >= stock]
        return str(kept[-1]) if kept else choices[0]

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
        sums = {sum(demands) for demands in product(*self.demands)}
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
                    got = tuple(a + b for a, b in zip(takes, self.shares(stock, demands), strict=True))
                    then = (self.grown(stock, sum(demands)), got)
                    following[then] = following.get(then, 0.0) + probability * chance
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
            number = len(self.demands[player])
            for own in range(number):
                alone = [*policies]
                alone[player] = {stock: [float(k == own) for k in range(number)]}
                found.append(
                    math.fsum(
                        chance * (self.shares(stock, d)[player] + best_from(played + 1, self.grown(stock, sum(d))))
                        for d, chance in self._moves(stock, alone)
                    )
                )
            return max(found)

        return best_from(0, o.capacity)

    def _moves(self, stock: int, policies: Sequence[Policy]) -> list[tuple[tuple[int, ...], float]]:
        """What the players may demand at this stock, and how likely that is; impossible ones left out."""
        found = []
        for choices in product(*(range(len(demands)) for demands in self.demands)):
            chance = math.prod(policies[i][stock][choice] for i, choice in enumerate(choices))
            if chance:
                found.append((tuple(self.demands[i][choice] for i, choice in enumerate(choices)), chance))
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
                    takes = int(demands[player] > 0)
                    then = (self.grown(stock, sum(demands)), total + takes * number, count + takes)
                    following[then] = following.get(then, 0.0) + probability * chance
            reached = following
        return math.fsum(p * total / count for (_, total, count), p in reached.items() if count)


def _mean_time(rounds: Sequence[int]) -> float:
    return math.fsum(rounds) / len(rounds) if rounds else 0.0
