"""Branching points: where an answer with choices can go on in more than one way.

A point is all that decides the distribution of its next token, so whoever stands at the same point shares one call to a
server, now or later: the last ones are kept, until the adapter version they belong to is published again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from coterie.inference.sampling import Distribution
from coterie.types import AdapterVersion, GenerateRequest

Found = tuple[Distribution, str]
"""A distribution, and the server it came from."""


@dataclass(frozen=True, slots=True)
class Point:
    """What decides a distribution."""

    adapter: AdapterVersion | None
    prompt_ids: tuple[int, ...]
    allowed: tuple[int, ...]
    bias: tuple[tuple[int, float], ...]
    temperature: float


def point_of(request: GenerateRequest, path: tuple[int, ...], allowed: tuple[int, ...]) -> Point:
    """Where `request` stands after the tokens of `path`, when only `allowed` may follow."""
    bias = request.bias or {}
    return Point(
        adapter=request.adapter,
        prompt_ids=request.prompt_ids + path,
        allowed=allowed,
        bias=tuple((token, bias[token]) for token in allowed if bias.get(token)),
        temperature=request.temperature or 1.0,
    )


def distribution_of(allowed: tuple[int, ...], logs: Mapping[int, float]) -> Distribution:
    """The distribution over `allowed` whose log-probabilities are `logs`."""
    logprobs = tuple(min(0.0, logs[token]) for token in allowed)
    probs = tuple(map(math.exp, logprobs))
    entropy = -sum(p * log for p, log in zip(probs, logprobs, strict=True) if p > 0.0)
    return Distribution(allowed, probs, logprobs, tuple(accumulate(probs)), entropy)


class KnownPoints:
    """The distributions last asked for."""

    def __init__(self, most: int) -> None:
        """`most`: kept at once; 0: none."""
        self._most = most
        self._found: OrderedDict[Point, Found] = OrderedDict()

    def get(self, point: Point) -> Found | None:
        """None: it is not known."""
        found = self._found.get(point)
        if found is not None:
            self._found.move_to_end(point)
        return found

    def put(self, point: Point, found: Found) -> None:
        """Keep one more, in place of the one not asked for longest."""
        if self._most:
            self._found[point] = found
            while len(self._found) > self._most:
                self._found.popitem(last=False)

    def forget(self, version: AdapterVersion) -> None:
        """Forget the points of an adapter version."""
        for point in [point for point in self._found if point.adapter == version]:
            del self._found[point]
