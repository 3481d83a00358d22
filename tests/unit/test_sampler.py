"""Drawing from a whole vocabulary: exact, seeded, and never a token without probability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.inference.local.sampler import sample_vocabulary, vocabulary_entropy


def _rows(size: int, count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("size", [3, 255, 256, 257, 1000, 4096])
def test_tokens_are_those_of_the_plain_inverse_cumulative_sum(size: int) -> None:
    probs = _rows(size).softmax(-1)
    uniforms = [(i + 0.5) / 400 for i in range(400)]
    for row in range(len(probs)):
        found = sample_vocabulary(probs, torch.full((400,), row), uniforms)
        ends = probs[row].double().cumsum(-1)
        wanted = torch.searchsorted(ends, torch.tensor(uniforms, dtype=torch.float64) * ends[-1], right=True)
        # the two sums are rounded differently: a uniform number within rounding of an edge may fall on either side
        assert (found != wanted).sum() <= 1


def test_rows_are_drawn_from_by_number() -> None:
    probs = torch.eye(3).repeat_interleave(100, dim=1)[:, :290] / 100
    found = sample_vocabulary(probs, torch.tensor([2, 0, 1, 1]), [0.5, 0.0, 0.999999, 0.1])
    assert [int(t) // 100 for t in found] == [2, 0, 1, 1]


@given(st.integers(1, 600), st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_token_without_probability_is_never_drawn(size: int, seed: int, u: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, size, generator=generator) * (torch.rand(1, size, generator=generator) < 0.1)
    weights[0, seed % size] = 1e-6
    probs = weights / weights.sum()
    token = int(sample_vocabulary(probs, torch.tensor([0]), [u])[0])
    assert probs[0, token] > 0


def test_entropy_is_that_of_the_definition() -> None:
    logits = _rows(700)
    logits[:, 5] = -1e30
    probs = logits.softmax(-1)
    expected = torch.special.entr(probs.double()).sum(-1)
    for token in (0, 6, 699):
        found = vocabulary_entropy(logits, probs, torch.full((5,), token))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
