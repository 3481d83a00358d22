"""The in-process engine: right probabilities, each prompt once, no dependence on the batch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.errors import EngineError, RequestError
from coterie.inference.local.choices import build_trie
from coterie.inference.local.engine import LocalEngine
from coterie.inference.local.sampler import uniform
from coterie.lm.base import BaseModel
from coterie.lm.tiny import FAMILIES, tiny_random
from coterie.types import AdapterVersion, GenerateRequest, Generation
from tests.conftest import MakeBase

A0, B0 = AdapterVersion("a", 0), AdapterVersion("b", 0)


def _engine(base: BaseModel) -> LocalEngine:
    for number, (name, rank) in enumerate((("a", 4), ("b", 7))):
        adapter = base.bank.add(name, rank, 2.0 * rank, number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=generator))
    return LocalEngine(base, cache_tokens=512, tokens_per_pass=64)


@pytest.fixture
def engine(tiny_base: BaseModel) -> LocalEngine:
    return _engine(tiny_base)


def _ask(engine: LocalEngine, requests: Sequence[GenerateRequest]) -> list[Generation]:
    async def go() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(r) for r in requests)))

    return asyncio.run(go())


def _prompt(n: int, length: int = 9) -> tuple[int, ...]:
    return tuple((7 * n + 13 * i) % 290 for i in range(length))


def _reference(base: BaseModel, request: GenerateRequest, made: Generation) -> list[float]:
    """Log-probabilities by merging the adapter into a plain transformers model."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    if request.adapter is not None:
        adapter = base.bank.get(request.adapter)
        with torch.no_grad():
            for s in adapter.shapes:
                delta = adapter.scaling * s.b(adapter.flat, adapter.rank) @ s.a(adapter.flat, adapter.rank)
                model.get_submodule(s.name).weight += delta
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt_ids + made.token_ids])).logits[0]
    found = []
    for j, token in enumerate(made.token_ids):
        row = logits[len(request.prompt_ids) + j - 1].clone()
        for i, value in (request.bias or {}).items():
            row[i] += value
        allowed = list(made.allowed[j]) if made.allowed else list(range(len(row)))
        logp = (row[allowed] / (request.temperature or 1.0)).log_softmax(-1)
        found.append(float(logp[allowed.index(token)]))
    return found


CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15))


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(_prompt(1), A0, seed=5, max_tokens=6),
        GenerateRequest(_prompt(1), None, seed=5, max_tokens=6, temperature=0.6),
        GenerateRequest(_prompt(2), B0, seed=9, choices=CHOICES),
        GenerateRequest(_prompt(2), A0, seed=11, choices=CHOICES, bias={11: 1.5, 15: -2.0}, temperature=1.7),
        GenerateRequest(_prompt(3), B0, seed=2, max_tokens=4, bias={3: 4.0}),
        GenerateRequest(_prompt(3), B0, seed=2, max_tokens=4, temperature=0.0),
    ],
)
def test_logprobs_are_those_of_the_policy_sampled_from(engine: LocalEngine, request_: GenerateRequest) -> None:
    # other requests in the batch must make no difference
    others = [GenerateRequest(_prompt(n, 5 + n), v, seed=n, max_tokens=3) for n, v in enumerate((A0, B0, None, A0))]
    made = _ask(engine, [*others, request_])[-1]
    assert made.logprobs == pytest.approx(_reference(engine.base, request_, made), abs=2e-4)


def test_a_choice_is_always_one_of_the_choices_and_its_probability_is_exact(engine: LocalEngine) -> None:
    request = GenerateRequest(_prompt(4), A0, seed=0, choices=CHOICES, distribution=True)
    (exact,) = _ask(engine, [request])
    assert exact.choice_probs is not None
    assert sum(exact.choice_probs) == pytest.approx(1.0, abs=1e-6)
    draws = _ask(engine, [GenerateRequest(_prompt(4), A0, seed=s, choices=CHOICES) for s in range(4000)])
    for index, p in enumerate(exact.choice_probs):
        mine = [d for d in draws if d.choice == index]
        assert len(mine) / len(draws) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(draws)) + 1e-3)
        for d in mine[:1]:
            assert d.token_ids == CHOICES[index]
            assert math.exp(sum(d.logprobs)) == pytest.approx(p, rel=1e-3)
            assert d.allowed is not None
            assert all(t in a for t, a in zip(d.token_ids, d.allowed, strict=True))


def test_identical_prompts_are_computed_once(engine: LocalEngine) -> None:
    _ask(engine, [GenerateRequest(_prompt(5), A0, seed=s, choices=((1,), (2,))) for s in range(200)])
    assert engine.tokens_computed == len(_prompt(5))
    # a longer prompt adds only what is new, another adapter shares nothing
    _ask(engine, [GenerateRequest((*_prompt(5), 3, 4), A0, seed=0, choices=((1,), (2,)))])
    assert engine.tokens_computed == len(_prompt(5)) + 2
    _ask(engine, [GenerateRequest(_prompt(5), B0, seed=0, choices=((1,), (2,)))])
    assert engine.tokens_computed == 2 * len(_prompt(5)) + 2


def test_what_is_sampled_depends_on_the_seed_alone(engine: LocalEngine) -> None:
    requests = [GenerateRequest(_prompt(n % 5), (A0, B0)[n % 2], seed=n, max_tokens=5) for n in range(12)]
    together = _ask(engine, requests)
    engine.cache.clear()
    alone = []
    for r in requests:
        alone += _ask(engine, [r])
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]
    assert len({t.token_ids for t in together}) > 6


def test_requests_that_arrive_while_others_decode_join_them(engine: LocalEngine) -> None:
    async def later() -> Generation:
        first = await engine.generate(GenerateRequest(_prompt(1), A0, seed=1, max_tokens=1))
        return await engine.generate(GenerateRequest((*_prompt(1), *first.token_ids), A0, seed=2, max_tokens=3))

    async def go() -> tuple[Generation, Generation]:
        long = engine.generate(GenerateRequest(_prompt(2), B0, seed=3, max_tokens=8))
        return tuple(await asyncio.gather(long, later()))  # type: ignore[return-value]

    long, chained = asyncio.run(go())
    (alone,) = _ask(engine, [GenerateRequest(_prompt(2), B0, seed=3, max_tokens=8)])
    assert long.token_ids == alone.token_ids
    assert len(chained.token_ids) <= 3


def test_a_cache_too_small_for_all_serves_all(tiny_base: BaseModel) -> None:
    tiny_base.bank.add("a", 4, 8, 0)
    requests = [GenerateRequest(_prompt(n, 20), A0, seed=n, max_tokens=6) for n in range(12)]
    roomy = _ask(LocalEngine(tiny_base, cache_tokens=2048), requests)
    tight = LocalEngine(tiny_base, cache_tokens=60, tokens_per_pass=32)
    assert [g.token_ids for g in _ask(tight, requests)] == [g.token_ids for g in roomy]


def test_free_text_ends_with_a_stop_token_or_at_the_limit(engine: LocalEngine) -> None:
    everything = tuple(range(engine.base.vocabulary))
    (stopped,) = _ask(engine, [GenerateRequest(_prompt(1), A0, seed=1, max_tokens=9, stop_ids=everything)])
    assert (stopped.finish_reason, len(stopped.token_ids)) == ("stop", 1)
    impossible = dict.fromkeys(engine.base.chat.stop_ids, -1000000000.0)
    (cut,) = _ask(engine, [GenerateRequest(_prompt(1), A0, seed=1, max_tokens=9, bias=impossible)])
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_publishing_the_old_version_is_gone_and_nothing_stale_is_served(make_base: MakeBase, dtype: str) -> None:
    engine = _engine(make_base(dtype=dtype))
    request = GenerateRequest(_prompt(6), A0, seed=0, choices=((1,), (2,)), distribution=True)
    (before,) = _ask(engine, [request])
    with torch.no_grad():
        engine.base.bank.training("a").flat.mul_(3.0)
    asyncio.run(engine.publish(AdapterVersion("a", 1), None))
    with pytest.raises(EngineError, match="a@v0 was never published"):
        _ask(engine, [request])
    (after,) = _ask(
        engine, [GenerateRequest(_prompt(6), AdapterVersion("a", 1), 0, choices=((1,), (2,)), distribution=True)]
    )
    assert after.choice_probs != before.choice_probs


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (GenerateRequest((), A0, seed=0), "prompt_ids is empty"),
        (GenerateRequest(_prompt(1), A0, seed=0, max_tokens=0), "max_tokens 0"),
        (
            GenerateRequest(_prompt(1), A0, seed=0, max_tokens=600),
            r"need 609 tokens.*cache holds 512; shorten.*raise engine\.cache_tokens",
        ),
        (GenerateRequest(_prompt(1), A0, seed=0, choices=()), "choices is empty"),
        (GenerateRequest(_prompt(1), A0, seed=0, choices=((1,), (1,))), "choices 0 and 1 are the same"),
        (GenerateRequest(_prompt(1), A0, seed=0, choices=((1,), ())), "choice 1 has no tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine: LocalEngine, bad: GenerateRequest, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        _ask(engine, [bad])
    # and the engine goes on
    assert _ask(engine, [GenerateRequest(_prompt(1), A0, seed=0, max_tokens=1)])[0].token_ids


def test_what_is_wrong_with_a_request_is_told_from_what_is_wrong_with_the_engine(engine: LocalEngine) -> None:
    with pytest.raises(EngineError, match="ghost@v0 was never published") as missing:
        _ask(engine, [GenerateRequest(_prompt(1), AdapterVersion("ghost", 0), seed=0)])
    assert not isinstance(missing.value, RequestError)
    roomy = LocalEngine(engine.base, cache_tokens=engine.base.context)
    with pytest.raises(RequestError, match=r"base model's context holds \d+; shorten.*choose a base with a longer one"):
        _ask(roomy, [GenerateRequest(_prompt(1), None, seed=0, max_tokens=engine.base.context)])


def test_a_choice_that_begins_another_ends_with_the_stop_token() -> None:
    root = build_trie(((1,), (1, 2)), 99)
    assert root.allowed == (1,)
    assert root.children[1].allowed == (2, 99)
    assert root.children[1].children[99].choice == 0
    with pytest.raises(RequestError, match="begins another choice"):
        build_trie(((1,), (1, 2)), None)


def test_uniform_numbers_are_uniform_and_streams_differ() -> None:
    numbers = [uniform(seed, i) for seed in range(100) for i in range(100)]
    assert all(0 <= n < 1 for n in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.015)
    assert len(set(numbers)) == len(numbers)
    counts = [sum(d / 10 <= n < (d + 1) / 10 for n in numbers) for d in range(10)]
    assert min(counts) > 850


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_breaks_leaves_nothing_half_computed(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Out of memory, or Ctrl-C in the middle of a pass: later requests find neither its keys nor a stopped engine."""
    request = GenerateRequest(_prompt(7), A0, seed=1, max_tokens=4)
    expected = _ask(engine, [request])
    engine.cache.clear()

    def broken(*arguments: object) -> torch.Tensor:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(engine.base, "hidden", broken)
        with pytest.raises(kind):
            _ask(engine, [request])
    made = asyncio.run(asyncio.wait_for(engine.generate(request), 30))
    assert made.token_ids == expected[0].token_ids
    assert made.logprobs == expected[0].logprobs


@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 57, 30, 12)], ids=["equal prompts", "prompts of all lengths"])
def test_siblings_that_share_a_prompt_get_the_probabilities_of_those_that_do_not(
    tiny_base: BaseModel, engine: LocalEngine, lengths: Sequence[int]
) -> None:
    requests = [
        GenerateRequest(_prompt(n, length), (A0, B0, None)[n % 3], seed=10 * n + k, max_tokens=6, temperature=0.9)
        for n, length in enumerate(lengths)
        for k in range(3)
    ]
    for request, made in zip(requests, _ask(engine, requests), strict=True):
        assert list(made.logprobs) == pytest.approx(_reference(tiny_base, request, made), abs=2e-4)


def test_many_adapters_with_short_segments_are_applied_as_one_would_be(tiny_base: BaseModel) -> None:
    names = [f"m{n}" for n in range(20)]
    for number, name in enumerate(names):
        # ranks of two pools, one of them longer than a pool
        adapter = tiny_base.bank.add(name, 3 if number == 5 else 4, 8.0 + number, number)
        with torch.no_grad():
            adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(number)))
    engine = LocalEngine(tiny_base)
    requests = [
        GenerateRequest(_prompt(n, 5 + n % 4), AdapterVersion(names[n % 20], 0), seed=n, max_tokens=4)
        for n in range(44)
    ]
    requests.append(GenerateRequest(_prompt(50), None, seed=1, max_tokens=4))
    for request, made in zip(requests, _ask(engine, requests), strict=True):
        assert list(made.logprobs) == pytest.approx(_reference(tiny_base, request, made), abs=2e-4)


def test_an_adapter_taken_out_leaves_its_place_clean(tiny_base: BaseModel) -> None:
    first = tiny_base.bank.add("first", 4, 8.0, 0)
    with torch.no_grad():
        first.flat.fill_(1.0)
    row = first.row
    tiny_base.bank.remove("first")
    del first
    second = tiny_base.bank.add("second", 4, 8.0, 0)
    assert second.row == row
    assert not any(second.b[shape.name].any() for shape in second.shapes)


def test_in_another_dtype_weights_are_copied_again_after_they_changed(tiny_base: BaseModel) -> None:
    adapter = tiny_base.bank.add("half", 2, 2.0, 0)
    name = adapter.shapes[0].name
    before = adapter.factors(torch.bfloat16)[name][1].clone()
    with torch.no_grad():
        adapter.flat.add_(1.0)
    adapter.touch()
    assert not torch.equal(adapter.factors(torch.bfloat16)[name][1], before)


def test_publishing_while_others_decode_changes_nothing_for_them(engine: LocalEngine) -> None:
    request = GenerateRequest(_prompt(4), B0, seed=8, max_tokens=12, stop_ids=(10_000,))
    (alone,) = _ask(engine, [request])

    async def go() -> Generation:
        asked = asyncio.ensure_future(engine.generate(request))
        for _ in range(20):
            await asyncio.sleep(0)
        await engine.publish(AdapterVersion("a", 1), None)
        return await asked

    assert asyncio.run(go()).token_ids == alone.token_ids


def test_a_kept_version_is_asked_for_while_the_learner_changes_the_weights(engine: LocalEngine) -> None:
    bank = engine.base.bank
    bank.keep(A0)
    request = GenerateRequest(_prompt(4), A0, seed=8, max_tokens=6)
    (before,) = _ask(engine, [request])
    with torch.no_grad():
        bank.training("a").flat.mul_(3.0)
    bank.publish(AdapterVersion("a", 1))
    engine.cache.clear()
    (after,) = _ask(engine, [request])
    assert after.logprobs == before.logprobs
    assert bank.kept("a") == (A0,)
    bank.drop(A0)
    with pytest.raises(EngineError, match="a@v0"):
        _ask(engine, [request])


def _crowd(**fields: Any) -> list[GenerateRequest]:
    """Requests under the base and two adapters, some of which share prompts."""
    made = {"max_tokens": 8, **fields}
    return [GenerateRequest(_prompt(n % 5, 6 + n % 5), (A0, B0, None)[n % 3], seed=n, **made) for n in range(15)]


def test_in_bfloat16_log_probabilities_are_those_of_the_policy_to_rounding(make_base: MakeBase) -> None:
    base = make_base(dtype="bfloat16")
    requests = [*_crowd(temperature=0.9), *_crowd(choices=CHOICES, bias={11: 1.5})]
    off: list[float] = []
    unadapted: list[float] = []
    for request, made in zip(requests, _ask(_engine(base), requests), strict=True):
        for other, found in ((request.adapter, off), (None, unadapted)):
            exact = _reference(base, replace(request, adapter=other), made)
            found += [abs(a - b) for a, b in zip(made.logprobs, exact, strict=True)]
    assert sum(off) / len(off) < 0.03
    assert max(off) < 0.15
    assert sum(unadapted) / len(unadapted) > 0.2  # what an adapter does is far more than rounding


def test_in_bfloat16_decoding_repeats_itself(make_base: MakeBase) -> None:
    requests = [*_crowd(temperature=0.0), *_crowd(), *_crowd(temperature=0.0, choices=CHOICES)]
    engine = _engine(make_base(dtype="bfloat16"))
    first = _ask(engine, requests)
    engine.cache.clear()
    for again in (_ask(engine, requests), _ask(_engine(make_base(dtype="bfloat16")), requests)):
        assert [(g.token_ids, g.logprobs) for g in again] == [(g.token_ids, g.logprobs) for g in first]
    exact = _ask(engine, [replace(r, distribution=True) for r in requests if r.choices])
    assert all(sum(g.choice_probs or ()) == pytest.approx(1.0, abs=1e-6) for g in exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_with_the_probabilities_of_transformers(
    make_base: MakeBase, tmp_path: Path, family: str
) -> None:
    """Decoding by cache, token by token, against plain passes over the whole sequence."""
    path = tiny_random(tmp_path / family, seed=3, family=family)  # type: ignore[arg-type]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = LocalEngine(make_base(model=str(path)))
    prompts = [_prompt(4), (*_prompt(4), 9), _prompt(30)]
    requests = [GenerateRequest(p, None, seed=n, max_tokens=6, stop_ids=(10_000,)) for n, p in enumerate(prompts * 2)]
    for request, made in zip(requests, _ask(engine, requests), strict=True):
        whole = torch.tensor([[*request.prompt_ids, *made.token_ids]])
        with torch.no_grad():
            expected = plain(whole).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        for step, (token, logprob) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
            assert logprob == pytest.approx(float(expected[step, token]), abs=2e-4)
            entropy = -float((expected[step].exp() * expected[step]).sum())
            assert made.entropy[step] == pytest.approx(entropy, abs=2e-4)
