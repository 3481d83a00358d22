"""Equality, normalising, and who wins several meetings."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.scenarios.contests import Odds, by_seat, odds, won
from coterie.scenarios.welfare import alike, equality, gini, normalised

amounts = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("payoffs", "expected"),
    [([1, 1, 1], 0), ([0, 0, 5], 2 / 3), ([0, 1], 0.5), ([1, 3], 0.25), ([2, 4, 6], 2 / 9), ([0, 0], 0), ([7], 0)],
)
def test_gini(payoffs: list[float], expected: float) -> None:
    assert gini(payoffs) == pytest.approx(expected)
    assert equality(payoffs) == pytest.approx(1 - expected)


@given(amounts, st.randoms())
def test_gini_is_the_mean_difference_and_knows_no_names(payoffs: list[float], rng: object) -> None:
    total, n = sum(payoffs), len(payoffs)
    differences = sum(abs(a - b) for a, b in product(payoffs, repeat=2))
    expected = differences / (2 * n * total) if total > 1e-9 else 0.0
    if total > 1e-9:
        assert gini(payoffs) == pytest.approx(expected, abs=1e-9)
    assert gini(payoffs) == gini(list(reversed(payoffs)))
    assert 0 <= gini(payoffs) <= 1 - 1 / n + 1e-9


def test_gini_refuses_what_it_is_not_of() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        gini([1, -1])
    with pytest.raises(ValueError, match="at least 0"):
        gini([])


def test_normalised() -> None:
    assert [normalised(value, -1, 3) for value in (-2, -1, 1, 3, 4)] == [0, 0, 0.5, 1, 1]
    with pytest.raises(ValueError, match="nothing lies between"):
        normalised(1, 2, 2)


def test_alike_marks_all_but_the_first() -> None:
    assert [seat.symmetric_with for seat in alike(["a", "b", "c"])] == [None, "a", "a"]


@pytest.mark.parametrize("meetings", [1, 2, 3, 5])
def test_odds_are_those_of_all_courses(meetings: int) -> None:
    meeting = Odds(0.5, 0.2, 0.3)
    expected = [0.0, 0.0, 0.0]
    for course in product((0, 1, 2), repeat=meetings):
        chance = 1.0
        for outcome in course:
            chance *= meeting[outcome]
        lead = course.count(0) - course.count(2)
        expected[0 if lead > 0 else 1 if lead == 0 else 2] += chance
    assert odds(meeting, meetings) == pytest.approx(tuple(expected))


def test_odds_need_a_meeting() -> None:
    with pytest.raises(ValueError, match="at least one"):
        odds(Odds(1, 0, 0), 0)


def test_who_won() -> None:
    assert won(0.6, 0.4) == (1, 0, 0)
    assert won(1 / 3 + 1 / 3, 2 / 3) == (0, 1, 0)
    assert won(0, 1) == (0, 0, 1)
    assert by_seat(["red_1", "blue_x"], {"red": 1.0, "blue": 0.0}) == {"red_1": 1.0, "blue_x": 0.0}
