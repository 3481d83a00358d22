"""Means and deviations that behave: exact on constants, independent of order, never a division by almost nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALLEST_DEVIATION = 1e-6
"""Below it, differences are rounding noise and say nothing: dividing by it would only blow the noise up."""


def mean(values: Sequence[float]) -> float:
    """Mean, the same bits in any order of `values`, and exactly the value when all are equal.

    fsum(values) / n alone is not: n * c is rounded before the division.
    """
    low = min(values)
    return low + math.fsum([value - low for value in values]) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation, the same bits in any order of `values`; exactly 0 when all are equal."""
    centre = mean(values)
    return math.sqrt(math.fsum([(value - centre) * (value - centre) for value in values]) / len(values))


def inverse_deviation(values: Sequence[float]) -> float:
    """1 / deviation, or 0 when the deviation is below `SMALLEST_DEVIATION`: no information, no gradient."""
    spread = deviation(values)
    return 1.0 / spread if spread >= SMALLEST_DEVIATION else 0.0
