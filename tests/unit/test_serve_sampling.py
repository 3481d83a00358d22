"""From logits to tokens: constraints hold, probabilities are those of the policy really sampled from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.serve.engine import FREE, NothingAllowedError, Step, Token, TokenRequest
from coterie.serve.sampling import allowed_ids, describe, forced, log_softmax, pack, pick, unpack

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 3.0], dtype=np.float32)


def request(**fields: Any) -> TokenRequest:
    return TokenRequest(**{"prompt_ids": (1,), "adapter": None, "seed": 0, "max_tokens": 8, **fields})


def probabilities(**fields: Any) -> dict[int, float]:
    """What each token that was ever drawn is said to have; every draw is checked against it."""
    step: Step = fields.pop("step", FREE)
    ids = allowed_ids(step, len(LOGITS))
    found: dict[int, list[float]] = {}
    for seed in range(400):
        token = pick(LOGITS if ids is None else LOGITS[ids], ids, step, request(seed=seed, **fields), 0)
        found.setdefault(token.token_id, []).append(token.logprob)
    assert all(len(set(values)) == 1 for values in found.values())
    drawn = {token: len(values) / 400 for token, values in found.items()}
    said = {token: math.exp(values[0]) for token, values in found.items()}
    for token, share in drawn.items():
        assert abs(share - said[token]) < 4 * math.sqrt(said[token] * (1 - said[token]) / 400) + 1e-9
    return said


def draw(step: Step) -> Token:
    ids = allowed_ids(step, len(LOGITS))
    return pick(LOGITS if ids is None else LOGITS[ids], ids, step, request(), 0)


def softmax(scores: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(v) for v in scores.values())
    return {token: math.exp(v) / total for token, v in scores.items()}


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({}, {0: 2, 1: 1, 2: 0, 3: -1, 4: 3}),
        ({"temperature": 2.0}, {0: 1, 1: 0.5, 2: 0, 3: -0.5, 4: 1.5}),
        ({"step": Step(ids=(1, 3))}, {1: 1, 3: -1}),
        ({"step": Step(mask=pack((0, 2), 5))}, {0: 2, 2: 0}),
        ({"step": Step(bias={4: -math.inf, 2: 2.0})}, {0: 2, 1: 1, 2: 2, 3: -1}),
        ({"step": Step(ids=(1, 3), bias={3: 1.0, 0: 9.0})}, {1: 1, 3: 0}),
        ({"step": Step(bias={3: 3.0}), "temperature": 0.5}, {0: 4, 1: 2, 2: 0, 3: 4, 4: 6}),
        ({"top_k": 2}, {0: 2, 4: 3}),
        ({"top_p": 0.64}, {0: 2, 4: 3}),  # 4 has 0.636 of the mass, so one more is needed
        ({"top_p": 0.6}, {4: 3}),
        ({"min_p": 0.2}, {0: 2, 4: 3}),  # 0 has 0.37 of the best's probability, 1 has 0.14
        ({"top_k": 3, "step": Step(ids=(0, 1, 2, 3))}, {0: 2, 1: 1, 2: 0}),
    ],
)
def test_log_probabilities_are_of_the_policy_sampled_from(fields: dict[str, Any], scores: dict[int, float]) -> None:
    wanted = softmax(scores)
    found = probabilities(**fields)
    assert set(found) <= set(wanted)
    for token, probability in found.items():
        assert probability == pytest.approx(wanted[token], rel=1e-6)
    likely = {token for token, probability in wanted.items() if probability > 0.02}
    assert likely <= set(found)


def test_greedy_takes_the_best_and_tells_its_probability_at_temperature_one() -> None:
    token = pick(LOGITS, None, Step(bias={4: -2.0}), request(temperature=0.0), 0)
    assert token.token_id == 0
    assert token.logprob == pytest.approx(math.log(softmax({0: 2, 1: 1, 2: 0, 3: -1, 4: 1})[0]), rel=1e-6)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    drawn = [pick(LOGITS, None, FREE, request(seed=7), position).token_id for position in range(40)]
    assert drawn == [pick(LOGITS, None, FREE, request(seed=7), position).token_id for position in range(40)]
    assert len(set(drawn)) > 1
    assert drawn != [pick(LOGITS, None, FREE, request(seed=8), position).token_id for position in range(40)]


def test_rank_and_the_most_probable_are_told() -> None:
    token = pick(LOGITS, None, Step(ids=None, bias={4: -9.0, 0: -9.0}), request(temperature=0, top_logprobs=3), 0)
    assert (token.token_id, token.rank) == (1, 1)
    assert [i for i, _ in token.top] == [1, 2, 3]
    assert token.top[0][1] == token.logprob
    ids = np.array([1, 3, 4])
    logprobs = log_softmax(LOGITS[ids].astype(np.float64))
    worst = describe(logprobs, ids, 1, 2)
    assert (worst.token_id, worst.rank) == (3, 3)
    assert [i for i, _ in worst.top] == [4, 1]
    assert describe(logprobs, ids, 1, 0).top == ()


def test_forbidden_tokens_are_never_among_the_most_probable() -> None:
    token = pick(LOGITS, None, Step(bias={4: -math.inf}), request(temperature=0, top_logprobs=5), 0)
    assert [i for i, _ in token.top] == [0, 1, 2, 3]


def test_ties_are_told_in_the_order_of_ids() -> None:
    token = describe(log_softmax(np.zeros(6)), None, 3, 4)
    assert [i for i, _ in token.top] == [0, 1, 2, 3]
    assert token.rank == 1


def test_mass_lost_to_rounding_never_gives_a_forbidden_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.serve.sampling.uniform", lambda seed, index: 1.0)
    token = pick(LOGITS, None, Step(bias={4: -math.inf, 3: -math.inf}), request(), 0)
    assert token.token_id == 2


@pytest.mark.parametrize("step", [Step(ids=()), Step(mask=pack((), 40)), Step(bias=dict.fromkeys(range(5), -math.inf))])
def test_a_step_that_allows_nothing_is_an_error(step: Step) -> None:
    with pytest.raises(NothingAllowedError, match="no token is allowed"):
        draw(step)


def test_the_only_token_is_certain() -> None:
    assert forced(3, 0).top == ()
    assert (forced(3, 2).token_id, forced(3, 2).logprob, forced(3, 2).top) == (3, 0.0, ((3, 0.0),))


@given(st.integers(1, 200).flatmap(lambda v: st.tuples(st.just(v), st.sets(st.integers(0, v - 1)))))
def test_bitmasks_hold_sets(case: tuple[int, set[int]]) -> None:
    vocabulary, ids = case
    mask = pack(sorted(ids), vocabulary)
    assert len(mask) == -(-vocabulary // 32)
    assert unpack(mask, vocabulary).tolist() == sorted(ids)
    for token in range(vocabulary):
        assert bool(int(mask[token // 32]) >> (token % 32) & 1) == (token in ids)
