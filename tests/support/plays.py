"""All plays of a small game: what `exact` says must be the sum over them.

    expected = over_all_plays(scenario, drawn_policy(3))        # metric -> its expectation

A play is replayed with every sequence of choices in turn, each weighed by the probability of its choices.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from coterie.scenarios.base import Scenario
from coterie.scenarios.practice import PracticeTable, Probabilities
from coterie.types import Observation, Outcome, SeatId, TrainingTask
from tests.support.tables import first_task


def drawn_policy(seed: int, *, sharp: float = 1.0) -> Probabilities:
    """A policy that depends on seat, prompt and choices, and on nothing else. `sharp`: higher is less even."""

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        rng = random.Random(f"{seed}:{seat}:{seen.system}:{seen.user}:{seen.prefix}:{choices}")
        weights = [rng.uniform(0.05, 1) ** sharp for _ in choices]
        return [weight / math.fsum(weights) for weight in weights]

    return probabilities


def pure(texts: dict[SeatId, str]) -> Probabilities:
    """Every seat always says its text, where it is among the choices; the first choice elsewhere."""

    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        said = texts[seat] if texts[seat] in choices else choices[0]
        return [float(choice == said) for choice in choices]

    return probabilities


def plays(
    scenario: Scenario, task: TrainingTask, policy: Probabilities, **options: Any
) -> Iterator[tuple[float, Outcome]]:
    """Every play of a task, with its probability; `options` are those of `PracticeTable`."""
    path: list[int] = []
    while True:
        widths: list[int] = []
        chances: list[float] = []

        def answer(
            seat: SeatId,
            seen: Observation,
            choices: Sequence[str] | None,
            rng: random.Random,
            path: list[int] = path,
            widths: list[int] = widths,
            chances: list[float] = chances,
        ) -> str:
            assert choices is not None
            taken = path[len(widths)] if len(widths) < len(path) else 0
            widths.append(len(choices))
            chances.append(policy(seat, seen, choices)[taken])
            return choices[taken]

        table = PracticeTable(task, scenario.seats(task), answer=answer, **options)
        outcome = asyncio.run(scenario.play(task, table))
        yield math.prod(chances), outcome
        path = [*path, *[0] * (len(widths) - len(path))][: len(widths)]
        while path and path[-1] + 1 == widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


def over_all_plays(
    scenario: Scenario, policy: Probabilities, tasks: Sequence[TrainingTask] = (), **options: Any
) -> dict[str, float]:
    """Expected metrics and scores (``score/<seat>``) over all plays of `tasks`, each task as likely as any other."""
    totals: dict[str, list[float]] = {}
    tasks = tasks or [first_task(scenario)]
    mass = []
    for task in tasks:
        for probability, outcome in plays(scenario, task, policy, **options):
            mass.append(probability)
            figures = {**outcome.metrics, **{f"score/{seat}": value for seat, value in outcome.scores.items()}}
            for name, value in figures.items():
                totals.setdefault(name, []).append(probability * value)
    assert math.isclose(math.fsum(mass), len(tasks)), "the plays are all there are"
    return {name: math.fsum(values) / len(tasks) for name, values in totals.items()}
