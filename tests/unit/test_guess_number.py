"""Guessing a number: searches by hand, binary search, exact figures against all plays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios.guess_number import GuessNumber, GuessNumberOptions, narrowed
from coterie.types import Observation, Split
from tests.support.plays import drawn_policy, over_all_plays
from tests.support.tables import exact, make_task, play, saying


def guessing(**options: Any) -> GuessNumber:
    return GuessNumber(GuessNumberOptions.model_validate(options))


def number(hidden: int, guesses: int = 6) -> Any:
    return make_task(content={"number": hidden}, max_steps=guesses)


def test_the_interval_narrows() -> None:
    outcome, table = play(guessing(players=1), number(7), answer=saying({"guesser": ["10", "3", "15", "8", "7"]}))
    assert [seen.prefix for seen in table["guesser"].shown] == [
        "Between 0 and 21",
        "Between 0 and 10",
        "Between 3 and 10",
        "Between 3 and 10",  # 15 was known to be too high
        "Between 3 and 8",
    ]
    assert outcome.scores == {"guesser": pytest.approx(1 - 4 / 6)}
    assert outcome.metrics == pytest.approx({"solved": 1, "guesses": 5, "score": 1 - 4 / 6, "outside": 1})


def test_who_never_finds_it_has_nothing() -> None:
    outcome, table = play(guessing(players=1, guesses=3), number(20, 3), answer=saying({"guesser": ["1"] * 3}))
    assert outcome.scores == {"guesser": 0}
    assert outcome.metrics == {"solved": 0, "guesses": 3, "score": 0, "outside": 2}
    assert len(table["guesser"].turns) == 3


def test_players_search_apart_or_together() -> None:
    said = {"guesser_1": ["10", "5"], "guesser_2": ["5", "6"]}
    apart, table = play(guessing(), number(5), answer=saying(said))
    assert apart.scores == pytest.approx({"guesser_1": 1 - 1 / 6, "guesser_2": 1})
    together, table = play(guessing(together=True), number(5), answer=saying(said))
    assert together.scores == pytest.approx({"guesser_1": 1 - 1 / 6, "guesser_2": 1 - 1 / 6})
    assert [seen.prefix for seen in table["guesser_2"].shown] == ["Between 0 and 10"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_binary_search_needs_five_guesses_at_most(language: str) -> None:
    scenario = guessing(players=1)
    halve = scenario.scripts["binary_search"]
    needed = []
    for hidden in range(1, 21):
        answer = lambda seat, seen, choices, rng: halve(seen, choices, rng)  # noqa: E731
        outcome, _ = play(scenario, number(hidden), answer=answer, language=language)
        assert outcome.metrics["solved"] == 1
        needed.append(outcome.metrics["guesses"])
    assert max(needed) == 5
    # one number in one guess, two in two, four in three, eight in four, five in five
    assert sum(needed) == 1 + 4 + 12 + 32 + 25
    assert exact(scenario)["oracle_guesses"] == pytest.approx(sum(needed) / 20)


@pytest.mark.parametrize(
    "options",
    [
        {"numbers": 4, "guesses": 3, "players": 1},
        {"numbers": 3, "guesses": 2, "players": 2},
        {"numbers": 4, "guesses": 4, "players": 2, "together": True},
    ],
)
def test_exact_is_the_sum_over_all_plays(options: dict[str, Any]) -> None:
    scenario, policy = guessing(**options), drawn_policy(6, sharp=2)
    tasks = [number(hidden, scenario.options.guesses) for hidden in range(1, scenario.options.numbers + 1)]
    expected = over_all_plays(scenario, policy, tasks)
    found = exact(scenario, probabilities=policy)
    metrics = {name: value for name, value in expected.items() if not name.startswith("score/")}
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    assert found["score"] < found["oracle_score"]


def test_nothing_beats_binary_search_on_average() -> None:
    scenario = guessing(numbers=7, guesses=7, players=1)

    def least(low: int, high: int) -> int:
        """The least number of guesses over all numbers of an interval, summed."""
        if low > high:
            return 0
        size = high - low + 1
        return size + min(least(low, g - 1) + least(g + 1, high) for g in range(low, high + 1))

    assert exact(scenario)["oracle_guesses"] == pytest.approx(least(1, 7) / 7)


def test_narrowing_never_widens() -> None:
    assert narrowed((4, 9), 2, 5) == (4, 9)
    assert narrowed((4, 9), 6, 5) == (4, 5)
    assert narrowed((4, 9), 4, 5) == (5, 9)


def test_tasks_are_all_numbers() -> None:
    scenario = guessing()
    assert sorted(task.content["number"] for task in scenario.tasks(Split.HELDOUT, 3)) == list(range(1, 21))
    assert 1 <= scenario._number(make_task()) <= 20
    for wrong in (0, 21, "7", True, None):
        with pytest.raises(ScenarioError, match=r"a whole number 1\.\.20"):
            scenario.check_task(make_task(content={"number": wrong}))


def test_seats_are_alike() -> None:
    scenario = guessing(players=3)
    assert [seat.symmetric_with for seat in scenario.seats(make_task())] == [None, "guesser_1", "guesser_1"]
    shown: Sequence[Observation] = [scenario.question(seat, (3, 9), "zh").shown for seat in scenario.players]
    assert {seen.prefix for seen in shown} == {"大于2小于10："}
