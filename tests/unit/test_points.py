"""Branching points: what makes two the same, and which are remembered."""

from __future__ import annotations

import math

import pytest

from coterie.inference.points import KnownPoints, Point, distribution_of, point_of
from coterie.types import AdapterVersion, GenerateRequest

A1, A2 = AdapterVersion("a", 1), AdapterVersion("a", 2)
HALF = distribution_of((5, 7), {5: math.log(0.5), 7: math.log(0.5)})


def at(*prompt: int, adapter: AdapterVersion | None = A1) -> Point:
    return Point(adapter, prompt, (5, 7), (), 1.0)


def test_only_what_decides_the_distribution_tells_points_apart() -> None:
    request = GenerateRequest((1, 2), A1, seed=1, bias={5: 0.5, 7: 0.0, 9: 2.0})
    point = point_of(request, (3,), (5, 7))
    assert point == Point(A1, (1, 2, 3), (5, 7), ((5, 0.5),), 1.0)  # no bias of 0, none of a token that may not come
    other_seed = GenerateRequest((1, 2), A1, seed=2, bias={5: 0.5})
    assert point_of(other_seed, (3,), (5, 7)) == point
    assert point_of(GenerateRequest((1, 2, 3), A1, seed=1, bias={5: 0.5}), (), (5, 7)) == point
    greedy = GenerateRequest((1, 2), A1, seed=1, bias={5: 0.5}, temperature=0.0)
    assert point_of(greedy, (3,), (5, 7)).temperature == 1.0  # log-probabilities of greedy turns are those at 1


def test_a_distribution_has_its_entropy_and_bears_what_cannot_happen() -> None:
    found = distribution_of((5, 7, 9), {5: math.log(0.25), 7: math.log(0.75), 9: -math.inf})
    assert found.probs == pytest.approx((0.25, 0.75, 0.0))
    assert found.entropy == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert found.cumulative[-1] == pytest.approx(1.0)
    assert found.greedy()[0] == 7


def test_the_points_not_asked_for_longest_go_first() -> None:
    known = KnownPoints(2)
    known.put(at(1), (HALF, "one"))
    known.put(at(2), (HALF, "two"))
    assert known.get(at(1)) == (HALF, "one")
    known.put(at(3), (HALF, "three"))
    assert known.get(at(2)) is None
    assert known.get(at(1)) is not None
    nothing = KnownPoints(0)
    nothing.put(at(1), (HALF, "one"))
    assert nothing.get(at(1)) is None


def test_a_version_that_is_published_again_is_forgotten_and_no_other() -> None:
    known = KnownPoints(8)
    for point in (at(1), at(2), at(1, adapter=A2), at(1, adapter=None)):
        known.put(point, (HALF, ""))
    known.forget(A1)
    assert known.get(at(1)) is known.get(at(2)) is None
    assert known.get(at(1, adapter=A2)) is not None
    assert known.get(at(1, adapter=None)) is not None
