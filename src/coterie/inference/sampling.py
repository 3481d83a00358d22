"""Sampling at one point of a choice, by seeded counter-based random numbers; every engine samples choices by this.

A request's i-th uniform number depends on (seed, i) alone, so what an episode samples does not depend on what else
is asked at the same time. Sampling is by inverse cumulative probability.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of stream `seed` (SplitMix64; Steele, Lea & Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The sampling distribution at one point, over a small allowed set."""

    allowed: tuple[int, ...]
    probs: tuple[float, ...]
    logprobs: tuple[float, ...]
    cumulative: tuple[float, ...]
    entropy: float
    """nats"""

    def sample(self, u: float) -> tuple[int, float]:
        """(token, log-probability) for a uniform number u."""
        i = min(bisect_right(self.cumulative, u * self.cumulative[-1]), len(self.allowed) - 1)
        while self.probs[i] == 0.0 and i > 0:
            i -= 1
        return self.allowed[i], self.logprobs[i]

    def greedy(self) -> tuple[int, float]:
        """The likeliest (token, log-probability); of equals the smallest id."""
        i = max(range(len(self.probs)), key=self.probs.__getitem__)
        return self.allowed[i], self.logprobs[i]
