"""The fake's log-probabilities are those of a softmax, recomputed here with nothing but `math`."""

from __future__ import annotations

import math
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coterie.inference.fake import ByteTokenizer, FakePolicy
from coterie.inference.fake.generation import generate
from coterie.inference.fake.requests import read_settings

TOKENS = ByteTokenizer()
_ids = st.integers(0, TOKENS.vocabulary - 1)
_bodies = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 5),
        "temperature": st.sampled_from([0, 0.2, 1.0, 2.0]),
        "logit_bias": st.dictionaries(_ids.map(str), st.floats(-120, 120), max_size=5),
        "logprobs": st.integers(0, 4),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
    optional={"allowed_token_ids": st.lists(_ids, min_size=1, max_size=12)},
)


@given(_bodies, st.lists(_ids, min_size=1, max_size=9), st.integers(0, 3), st.sampled_from(["", "some adapter"]))
def test_every_log_probability_is_that_of_the_softmax_sampled_from(
    body: dict[str, Any], prompt: list[int], seed: int, weights: str
) -> None:
    policy = FakePolicy(seed, TOKENS.vocabulary, weights)
    asked = read_settings(body, False, TOKENS, 100, random.Random(0), 20)
    made = generate(policy, tuple(prompt), asked, body["seed"], TOKENS, "processed_logprobs")
    assert made == generate.__wrapped__(policy, tuple(prompt), asked, body["seed"], TOKENS, "processed_logprobs")
    assert 1 <= len(made.token_ids) <= body["max_tokens"]
    context = list(prompt)
    for token, logprob, top in zip(made.token_ids, made.logprobs, made.tops, strict=True):
        logits = policy.logits(context)
        scaled = {
            i: (logits[i] + max(-100, min(100, body["logit_bias"].get(str(i), 0)))) / (body["temperature"] or 1)
            for i in body.get("allowed_token_ids", range(TOKENS.vocabulary))
        }
        most = max(scaled.values())
        norm = most + math.log(math.fsum(math.exp(x - most) for x in scaled.values()))
        exact = {i: x - norm for i, x in scaled.items()}
        assert math.isclose(logprob, exact[token], abs_tol=1e-9)
        if body["temperature"] == 0:
            assert exact[token] == max(exact.values())
        likeliest = sorted(exact.values(), reverse=True)[: body["logprobs"]]
        assert top[token] == logprob
        assert len(top) <= len(likeliest) + 1
        for p, q in zip(likeliest, sorted(top.values(), reverse=True), strict=False):
            assert math.isclose(max(p, -9999.0), q, abs_tol=1e-9)
        assert all(math.isclose(max(exact[i], -9999.0), p, abs_tol=1e-9) for i, p in top.items())
        context.append(token)


@given(st.lists(_ids, min_size=1, max_size=6), st.integers(0, 50))
def test_generation_ends_with_the_first_stop_token_and_keeps_it(prompt: list[int], seed: int) -> None:
    body = {"max_tokens": 30, "allowed_token_ids": [TOKENS.END, 50, 51, 52], "stop_token_ids": [52]}
    asked = read_settings(body, False, TOKENS, 100, random.Random(0), 20)
    made = generate(FakePolicy(1, TOKENS.vocabulary), tuple(prompt), asked, seed, TOKENS, "processed_logprobs")
    *before, last = made.token_ids
    assert not {TOKENS.END, 52} & set(before)
    assert (made.finish_reason == "stop") == (last in (TOKENS.END, 52))
    assert made.finish_reason == "stop" or len(made.token_ids) == 30
    assert made.texts[-1] == TOKENS.decode(before if made.finish_reason == "stop" else made.token_ids)
