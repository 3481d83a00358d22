"""Blotto, two against two: team-mates send troops of their own to the same fields, and a team's troops add up.

    each battle: every seat allocates its own troops; a team takes the fields where its two members together have more
    a battle is won by the team that takes more fields; the game by the team that wins more of its `battles`
    score of a seat = its team's battles won, a drawn one counting half, by all battles

What one sends is wasted where the partner already has enough, so team-mates must divide the fields. With two troops
each and five fields, any four different fields cannot be beaten (see the tests), while two who do not mind each other
often double up.

Where the strategy has communication (`coterie.scenarios.teamwork`), a plan is said before a battle and reaches the
partner if mode and roles let it: under central leadership a leader's plan is its own allocation (`DECISION`);
otherwise each whom the partner hears first says a plan (`ADVICE`) that binds nobody. Plans never cross sides.

Which model is on which team is said by the models (`team_id`); seats "red_1", "red_2", "blue_1", "blue_2" are filled
in that order. There is one task without further content (`single_task`). `exact` has every team's odds from the
members' probabilities, whoever holds the seats: trained models, the untrained base, or a partner trained elsewhere.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Final

from pydantic import Field, model_validator

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, choose, chosen, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random, repeated
from coterie.scenarios.blotto import Allocation, allocations, check_size, margin, name
from coterie.scenarios.contests import SIDES, Odds, by_seat, figures, odds, sign, won
from coterie.scenarios.teamwork import advice_speakers, heard_by
from coterie.types import ADVICE, DECISION, Observation, Outcome, Seat, SeatId, Split, TaskType, TrainingTask

MAX_PAIRS: Final = 2_000_000
"""Most (plans, allocations) of a team an exact computation goes through."""

_PROMPTS: Final = {
    "en": {
        "system": "Send {troops} units to fields 1 to {fields}.",
        "alone": "Partner: unknown",
        "heard": "Partner: {plan}",
        "plan": "Plan:",
        "prefix": "Send:",
    },
    "zh": {
        "system": "把{troops}个兵派到1到{fields}号地。",
        "alone": "队友：未知",
        "heard": "队友：{plan}",
        "plan": "计划：",
        "prefix": "派：",
    },
}


class TeamBlottoOptions(ScenarioOptions):
    """Settings of Blotto for teams."""

    fields: int = Field(default=5, ge=2, le=9)
    """To be taken in every battle."""
    troops: int = Field(default=2, ge=1, le=6)
    """Of each seat; a team has twice as many."""
    battles: int = Field(default=7, ge=1, le=25)
    """In a game; the team that wins more of them wins it."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; above 0.3 plans are said before a battle."""

    @model_validator(mode="after")
    def _small(self) -> TeamBlottoOptions:
        check_size(self.troops, self.fields)
        return self


class TeamBlotto:
    """Two sides of two.

    Metrics, of `play` and in expectation of `exact` alike: ``red_wins``, ``blue_wins`` and ``draws`` of the game;
    ``red_battles``, red's share of the battles, drawn ones counting half; ``<side>_covered``, the mean number of
    fields a side sent troops to.

    Scripts: ``random``; ``low`` and ``high``, which keep to the first and to the last fields.
    """

    Options = TeamBlottoOptions
    single_task = True

    def __init__(self, options: TeamBlottoOptions) -> None:
        self.options = options
        self.allocations = allocations(options.troops, options.fields)
        self.names = tuple(map(name, self.allocations))
        self.teams: Mapping[str, tuple[SeatId, SeatId]] = {side: (f"{side}_1", f"{side}_2") for side in SIDES}
        """The seats of each side."""
        spread = "".join(str(1 + i % options.fields) for i in range(options.troops))
        low = "".join(sorted(spread))
        high = "".join(sorted(str(options.fields + 1 - int(field)) for field in spread))
        self.scripts: Mapping[str, Script] = {
            "random": at_random,
            "low": lambda seen, choices, rng: low,
            "high": lambda seen, choices, rng: high,
        }

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """The one task: endlessly for TRAIN, once for HELDOUT."""
        o = self.options
        task = TrainingTask(
            task_id=f"team-blotto-{o.troops}-{o.fields}",
            task_type=TaskType.OPTIMIZATION,
            reward_pool=o.reward_pool,
            max_steps=2 * o.battles,
            required_models=4,
            cooperation_level=o.cooperation_level,
            content={"troops": o.troops, "fields": o.fields, "battles": o.battles},
            split=split,
        )
        return repeated(task)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [seat for one, other in self.teams.values() for seat in (Seat(one), Seat(other, symmetric_with=one))]

    # -- playing --------------------------------------------------------------------------------------------------

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        battles = [await self._battle(table) for _ in range(self.options.battles)]
        margins = [sign(margin(battle["red"], battle["blue"])) for battle in battles]
        red = sum((1 + m) / 2 for m in margins) / len(margins)
        covered = {side: sum(_covered(battle[side]) for battle in battles) / len(battles) for side in SIDES}
        return Outcome(
            scores=by_seat(table.seats, {"red": red, "blue": 1.0 - red}),
            metrics=self._metrics(won(red, 1.0 - red), red, covered),
        )

    async def _battle(self, table: Table) -> dict[str, Allocation]:
        """Plans, then allocations: the troops of each side on each field."""
        planning = [self._planning(table, seat) for seat in self._speakers(table)]
        kind = self._kind(table)
        turns = await asyncio.gather(*(table[q.seat].act(q.shown, choices=q.choices, kind=kind) for q in planning))
        plans = {turn.seat_id: chosen(turn) for turn in turns}
        decided = dict(plans) if kind == DECISION else {}
        open_seats = [seat for pair in self.teams.values() for seat in pair if seat not in decided]
        questions = [self._question(seat, self._heard(table, seat, plans), table.language) for seat in open_seats]
        decided.update(zip(open_seats, await choose(table, questions, "move"), strict=True))
        return {side: self._together(*(decided[seat] for seat in pair)) for side, pair in self.teams.items()}

    def _speakers(self, table: Table) -> list[SeatId]:
        """Seats whose partner hears them, where there is communication at all."""
        return [seat for seat in advice_speakers(table) if table.hears(self._partner(seat), seat)]

    def _kind(self, table: Table) -> str:
        return DECISION if table.strategy.leadership == "central" else ADVICE

    def _heard(self, table: Table, seat: SeatId, plans: Mapping[SeatId, int]) -> int | None:
        """The partner's plan, if it reaches `seat`."""
        told = {speaker: name for speaker, name in plans.items() if speaker == self._partner(seat)}
        reached = heard_by(table, seat, {speaker: self.names[plan] for speaker, plan in told.items()})
        return told[reached[0][0]] if reached else None

    def _partner(self, seat: SeatId) -> SeatId:
        one, other = self.teams[seat.partition("_")[0]]
        return other if seat == one else one

    def _together(self, one: int, other: int) -> Allocation:
        return tuple(a + b for a, b in zip(self.allocations[one], self.allocations[other], strict=True))

    def _planning(self, table: Table, seat: SeatId) -> Question:
        """What a seat is asked before a battle: a leader for what it does, others for what they intend."""
        if self._kind(table) == DECISION:
            return self._question(seat, None, table.language)
        asked = self._question(seat, None, table.language)
        shown = Observation(asked.shown.user, asked.shown.system, _PROMPTS[table.language]["plan"])
        return Question(seat, shown, asked.choices)

    def _question(self, seat: SeatId, heard: int | None, language: str) -> Question:
        """What a seat sees when it allocates; the same for all seats. `heard`: its partner's plan."""
        text = _PROMPTS[language]
        user = text["alone"] if heard is None else text["heard"].format(plan=self.names[heard])
        system = text["system"].format(troops=self.options.troops, fields=self.options.fields)
        return Question(seat, Observation(system=system, user=user, prefix=text["prefix"]), self.names)

    # -- exactly --------------------------------------------------------------------------------------------------

    async def exact(self, table: Table) -> dict[str, float]:
        """The odds of the policies at `table`, over all plans and allocations.

        Returns:
            The metrics of `play` in expectation; ``red_battle_wins`` and ``blue_battle_wins``, the probabilities of
            winning one battle; ``<side>_exploitability``: the expected share of a battle, above the 1/2 that is the
            game's value, of the best troops of a whole team against this one.

        Raises:
            ScenarioError: plans and allocations are too many.
        """
        found = dict(zip(SIDES, [await self._troops(table, side) for side in SIDES], strict=True))
        red, blue = found["red"], found["blue"]
        chances = {-1: 0.0, 0: 0.0, 1: 0.0}
        for ours, p in red.items():
            for theirs, q in blue.items():
                chances[sign(margin(ours, theirs))] += p * q
        battle = Odds(chances[1], chances[0], chances[-1])
        covered = {side: math.fsum(p * _covered(a) for a, p in found[side].items()) for side in SIDES}
        return {
            **self._metrics(odds(battle, self.options.battles), battle.win + battle.draw / 2, covered),
            "red_battle_wins": battle.win,
            "blue_battle_wins": battle.loss,
            **{f"{side}_exploitability": self.best_response(found[side]) - 0.5 for side in SIDES},
        }

    def best_response(self, troops: Mapping[Allocation, float]) -> float:
        """The greatest expected share of a battle any team of this size has against these troops."""
        return max(
            math.fsum(p * (1 + sign(margin(own, other))) / 2 for other, p in troops.items())
            for own in allocations(2 * self.options.troops, self.options.fields)
        )

    async def _troops(self, table: Table, side: str) -> dict[Allocation, float]:
        """Probability of everything a side may have on the fields in one battle."""
        pair = self.teams[side]
        speakers = [seat for seat in self._speakers(table) if seat in pair]
        size = len(self.allocations)
        if size ** (2 + (len(speakers) if self._kind(table) == ADVICE else 0)) > MAX_PAIRS:
            raise ScenarioError(
                f"team_blotto: {size} allocations of each seat, said and done, are too many to compute exactly; lower "
                f"troops or fields, lower cooperation_level to 0.3 (no plans), or measure by playing episodes"
            )
        said = await distributions(table, {seat: self._planning(table, seat) for seat in speakers})
        asked = {
            (seat, heard): self._question(seat, heard, table.language)
            for seat in pair
            for heard in {self._heard(table, seat, dict.fromkeys(speakers, plan)) for plan in range(size)}
        }
        does = await distributions(table, asked)
        troops: dict[Allocation, float] = {}
        for plans in product(range(size), repeat=len(speakers)):
            told = dict(zip(speakers, plans, strict=True))
            chance = math.prod(said[seat][plan] for seat, plan in told.items())
            if not chance:
                continue
            rows = []
            for seat in pair:
                if seat in told and self._kind(table) == DECISION:
                    rows.append({told[seat]: 1.0})
                else:
                    rows.append(dict(enumerate(does[seat, self._heard(table, seat, told)])))
            for one, p in rows[0].items():
                for other, q in rows[1].items():
                    both = self._together(one, other)
                    troops[both] = troops.get(both, 0.0) + chance * p * q
        return troops

    def _metrics(self, game: Odds, red: float, covered: Mapping[str, float]) -> dict[str, float]:
        return {**figures(game), "red_battles": red, **{f"{side}_covered": covered[side] for side in SIDES}}


def _covered(troops: Allocation) -> int:
    """Fields with any troops."""
    return sum(count > 0 for count in troops)
