"""The simulated tier: labelled, seeded, and never trained on."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from coterie.errors import EngineError
from coterie.inference.simulated import LABEL, SimulatedEngine, simulated_text
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier, Turn
from tests.support.engines import Words

CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15), (16, 17))


def ask(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": (1, 2, 3), "adapter": AdapterVersion("a", 1), "seed": 1, **fields})


def made(request: GenerateRequest, engine: SimulatedEngine | None = None) -> Generation:
    return asyncio.run((engine or SimulatedEngine()).generate(request))


def test_texts_say_that_they_are_simulated_and_depend_on_the_seed() -> None:
    texts = [simulated_text(seed) for seed in range(40)]
    assert all(text.startswith(LABEL) for text in texts)
    assert len(set(texts)) == 4
    assert texts == [simulated_text(seed) for seed in range(40)]
    assert simulated_text(2**64 + 5)  # seeds of any size


def test_turns_read_as_what_they_are_where_text_can_be_encoded() -> None:
    chat = Words()

    def encode(text: str) -> tuple[int, ...]:
        return tuple(map(chat.id, text.split()))

    engine = SimulatedEngine(encode)
    turn = made(ask(max_tokens=64, stop_ids=chat.stop_ids), engine)
    assert chat.decode(turn.token_ids) == simulated_text(1)
    assert (turn.finish_reason, turn.token_ids[-1]) == ("stop", 0)
    cut = made(ask(max_tokens=2, stop_ids=chat.stop_ids), engine)
    assert (cut.finish_reason, chat.decode(cut.token_ids).split()[0]) == ("length", LABEL)


@pytest.mark.parametrize("seed", range(20))
def test_without_words_tokens_come_from_the_prompt(seed: int) -> None:
    turn = made(ask(seed=seed, max_tokens=6, stop_ids=(9,)))
    assert 1 <= len(turn.token_ids) <= 6
    ended = turn.token_ids[-1] == 9
    assert turn.finish_reason == ("stop" if ended else "length")
    assert set(turn.token_ids) <= {1, 2, 3, 9}
    assert all(p in (0.0, pytest.approx(-math.log(3))) for p in turn.logprobs)
    assert len(turn.logprobs) == len(turn.entropy) == len(turn.token_ids)


def test_choices_are_equally_likely_however_their_tokens_are_shared() -> None:
    engine = SimulatedEngine()
    turns = [made(ask(seed=seed, choices=CHOICES), engine) for seed in range(2000)]
    for choice in range(5):
        mine = [turn for turn in turns if turn.choice == choice]
        assert len(mine) == pytest.approx(400, abs=80)
        assert {turn.token_ids for turn in mine} == {CHOICES[choice]}
        assert math.exp(sum(mine[0].logprobs)) == pytest.approx(0.2)
    asked = made(ask(choices=CHOICES, distribution=True), engine)
    assert asked.choice_probs == pytest.approx((0.2,) * 5)
    assert asked.token_ids == ()


def test_nothing_it_makes_can_be_trained_on() -> None:
    generation = made(ask(choices=CHOICES))
    assert generation.tier is Tier.SIMULATED
    turn = Turn(
        seat_id="s", model_id="a", adapter=generation.adapter, kind="answer", prompt_ids=generation.prompt_ids,
        token_ids=generation.token_ids, logprobs=generation.logprobs, allowed=generation.allowed, bias=None,
        temperature=1.0, entropy=generation.entropy, text="", choice=generation.choice, valid=True,
        tier=generation.tier,
    )  # fmt: skip
    assert not turn.trainable


def test_bad_requests_are_refused_as_by_any_engine() -> None:
    for request, said in (
        (ask(prompt_ids=()), "prompt_ids"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(distribution=True), "choices"),
        (ask(choices=()), "choices"),
    ):
        with pytest.raises(EngineError, match=said):
            made(request)
