"""Calibration: what a model likes to say is taken out of its choices, what the prompt says stays."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence

import pytest

from coterie.inference.base import Engine
from coterie.inference.local.engine import LocalEngine
from coterie.lm.base import BaseModel
from coterie.rollout.calibration import Calibration
from coterie.types import GenerateRequest
from tests.support.engines import LogitEngine, Words

CHAT = Words()
RED, BLUE, GREEN = (CHAT.id(word) for word in ("red", "blue", "green"))
PRIOR = {RED: 3.0, BLUE: -1.0, GREEN: 0.5}


def ids(choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(CHAT.id, choice.split())) for choice in choices)


def ask(number: int, choices: Sequence[str], bias: Mapping[int, float] | None = None) -> GenerateRequest:
    """Prompt number `number` with these choices."""
    return GenerateRequest(
        prompt_ids=(CHAT.id("prompt"), CHAT.id(f"n{number}")),
        adapter=None,
        seed=0,
        choices=ids(choices),
        bias=bias,
        stop_ids=CHAT.stop_ids,
        distribution=True,
    )


def fitted(engine: Engine, seen: Mapping[tuple[str, tuple[str, ...]], Sequence[GenerateRequest]]) -> Calibration:
    calibration = Calibration(recording=True)
    for (seat, choices), requests in seen.items():
        for request in requests:
            calibration.saw(seat, choices, request)
    calibration.recording = False
    asyncio.run(calibration.fit(engine, 0))
    return calibration


def probabilities(engine: Engine, request: GenerateRequest) -> tuple[float, ...]:
    found = asyncio.run(engine.generate(request)).choice_probs
    assert found is not None
    return found


def prefers(prior: Mapping[int, float], evidence: float = 0.0) -> LogitEngine:
    """Likes tokens by `prior`; prompt n speaks for token n modulo 3 with strength `evidence`."""
    names = {CHAT.id(f"n{n}"): (RED, BLUE, GREEN)[n % 3] for n in range(30)}

    def logit(prefix: tuple[int, ...], token: int) -> float:
        said = [names[t] for t in prefix if t in names]
        return prior.get(token, 0.0) + (evidence if token in said else 0.0)

    return LogitEngine(logit)


COLOURS = ("red", "blue", "green")
SEEN = {("seat", COLOURS): [ask(n, COLOURS) for n in range(12)]}


def test_a_pure_prior_is_taken_out_whole() -> None:
    engine = prefers(PRIOR)
    assert probabilities(engine, ask(0, COLOURS))[0] > 0.9
    bias = fitted(engine, SEEN).bias("seat", COLOURS)
    assert bias is not None
    assert bias[RED] < bias[GREEN] < bias[BLUE]
    assert probabilities(engine, ask(0, COLOURS, bias)) == pytest.approx([1 / 3] * 3)


def test_the_bias_is_the_formula() -> None:
    engine = prefers(PRIOR, evidence=0.7)
    bias = fitted(engine, SEEN).bias("seat", COLOURS)
    means = [
        sum(math.log(probabilities(engine, ask(n, COLOURS))[i]) for n in range(12)) / 12 for i in range(len(COLOURS))
    ]
    assert bias == pytest.approx({t: math.log(1 / 3) - m for t, m in zip((RED, BLUE, GREEN), means, strict=True)})


def test_what_the_prompt_says_stays_and_decides() -> None:
    engine = prefers(PRIOR, evidence=2.0)
    bias = fitted(engine, SEEN).bias("seat", COLOURS)
    for number in range(12):
        before, after = (probabilities(engine, ask(number, COLOURS, b)) for b in (None, bias))
        assert max(range(3), key=before.__getitem__) == 0  # red, whatever the prompt says
        assert max(range(3), key=after.__getitem__) == number % 3
        assert after[number % 3] == pytest.approx(math.exp(2) / (math.exp(2) + 2))


def test_the_prior_makes_no_difference_to_the_calibrated_policy() -> None:
    results = []
    for prior in (PRIOR, {}, {RED: -5.0}):
        engine = prefers(prior, evidence=1.3)
        bias = fitted(engine, SEEN).bias("seat", COLOURS)
        results.append(probabilities(engine, ask(1, COLOURS, bias)))
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])


def test_choices_that_begin_alike_are_level_too() -> None:
    """Three of four choices begin with one token: its side of the trie must weigh three quarters."""
    choices = ("red cup", "red hat", "red pen", "blue cup")
    engine = prefers({**PRIOR, CHAT.id("cup"): 2.0})
    seen = {("seat", choices): [ask(n, choices) for n in range(6)]}
    bias = fitted(engine, seen).bias("seat", choices)
    assert probabilities(engine, ask(0, choices, bias)) == pytest.approx([0.25] * 4)


def test_a_choice_that_begins_another_is_level_too() -> None:
    choices = ("red", "red cup", "blue")
    engine = prefers({**PRIOR, 0: 1.5})
    seen = {("seat", choices): [ask(n, choices) for n in range(6)]}
    bias = fitted(engine, seen).bias("seat", choices)
    assert probabilities(engine, ask(0, choices, bias)) == pytest.approx([1 / 3] * 3)


def test_a_token_at_several_points_gets_the_mean_of_its_biases() -> None:
    choices = ("red cup", "red hat", "blue cup", "blue pen")
    cup = CHAT.id("cup")

    def logit(prefix: tuple[int, ...], token: int) -> float:
        return 2.0 if token == cup and prefix[-1] == RED else 0.0

    bias = fitted(LogitEngine(logit), {("seat", choices): [ask(n, choices) for n in range(4)]}).bias("seat", choices)
    assert bias is not None
    strong = math.log(0.5) - math.log(math.exp(2) / (math.exp(2) + 1))
    assert bias[cup] == pytest.approx((strong + 0.0) / 2)


def test_every_seat_and_choice_set_has_its_own_bias() -> None:
    others = ("red", "blue")
    seen = {
        ("one", COLOURS): [ask(n, COLOURS) for n in range(5)],
        ("two", others): [ask(n, others) for n in range(5)],
    }
    calibration = fitted(prefers(PRIOR), seen)
    assert set(calibration.biases) == set(seen)
    assert calibration.bias("one", others) is None
    # the same object every time: the learner groups turns by it
    assert calibration.bias("one", COLOURS) is calibration.bias("one", COLOURS)


def test_a_choice_set_seen_in_few_prompts_gets_none_unless_these_are_all() -> None:
    rare = ("red", "green")
    seen = {
        ("seat", COLOURS): [ask(n, COLOURS) for n in range(4)],
        ("seat", rare): [ask(n, rare) for n in range(3)],
        ("other", rare): [ask(n, rare) for n in range(2)],
        ("seat", ("red", "blue")): [ask(1, ("red", "blue"))] * 9,  # the same prompt nine times is one
    }
    assert set(fitted(prefers(PRIOR), seen).biases) == {("seat", COLOURS), ("other", rare)}


def test_a_refused_prompt_is_left_out() -> None:
    calibration = Calibration(recording=True)
    for number in (0, 1):
        calibration.saw("seat", COLOURS, ask(number, COLOURS))
    calibration.forget("seat", COLOURS, ask(1, COLOURS))
    calibration.forget("seat", None, ask(0, COLOURS))
    calibration.forget("another", COLOURS, ask(0, COLOURS))
    engine = prefers(PRIOR)
    asyncio.run(calibration.fit(engine, 0))
    assert {request.prompt_ids for request in engine.requests} == {ask(0, COLOURS).prompt_ids}
    alone = Calibration(recording=True)
    alone.saw("seat", COLOURS, ask(1, COLOURS))
    alone.forget("seat", COLOURS, ask(1, COLOURS))
    assert asyncio.run(alone.fit(engine, 0)) == 0


def test_nothing_is_remembered_unless_recording() -> None:
    calibration = Calibration()
    calibration.saw("seat", COLOURS, ask(0, COLOURS))
    calibration.recording = True
    calibration.saw("seat", None, ask(0, COLOURS))
    assert calibration.seen == {}
    assert asyncio.run(calibration.fit(prefers(PRIOR), 0)) == 0


def test_it_survives_json_bit_by_bit() -> None:
    calibration = fitted(prefers(PRIOR, 0.3), SEEN)
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again.biases == calibration.biases
    assert not again.recording


def test_it_levels_a_real_network(tiny_base: BaseModel) -> None:
    """The tiny random model has a prior like any other; after calibration the typical prompt leaves choices equal."""
    engine = LocalEngine(tiny_base, cache_tokens=2048)
    choices = ("a", "bc", "bde")
    tokens = ((70,), (71, 72), (71, 73))

    def prompt(number: int, bias: Mapping[int, float] | None = None) -> GenerateRequest:
        prompt_ids = tuple((number * 31 + 7 * i) % 280 for i in range(9))
        return GenerateRequest(prompt_ids, None, 0, choices=tokens, bias=bias, distribution=True)

    bias = fitted(engine, {("seat", choices): [prompt(n) for n in range(30)]}).bias("seat", choices)

    def unevenness(b: Mapping[int, float] | None) -> float:
        """Distance of the prompts' mean log-probabilities from each other, in nats."""
        rows = [probabilities(engine, prompt(n, b)) for n in range(30)]
        means = [sum(math.log(row[i]) for row in rows) / len(rows) for i in range(3)]
        return max(means) - min(means)

    # not to zero: a mean of log-probabilities is not moved by exactly the bias
    assert unevenness(bias) < 0.25 * unevenness(None)
