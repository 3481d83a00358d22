"""`LocalTokenEngine`: the same policy as the engine it drives, whatever else runs, and never long without a pause."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.errors import AdapterError, EngineError
from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import save_adapter
from coterie.lm.base import BaseModel
from coterie.serve.engine import FREE, NothingAllowedError, Step, Token, TokenRequest
from coterie.serve.local import LocalTokenEngine
from coterie.serve.sampling import pack
from coterie.types import AdapterVersion, GenerateRequest

A = AdapterVersion("a", 0)
SERVED = AdapterVersion("served", 1)


class Says:
    """Steering that wants the same step every time, and keeps what comes."""

    def __init__(self, step: Step = FREE, stop: int | None = None) -> None:
        self.step, self.stop = step, stop
        self.tokens: list[Token] = []

    def before(self) -> Step:
        return self.step

    def after(self, token: Token) -> bool:
        self.tokens.append(token)
        return token.token_id == self.stop

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


@pytest.fixture
def base(tiny_base: BaseModel) -> BaseModel:
    adapter = tiny_base.bank.add("a", 4, 8.0, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=generator))
    return tiny_base


@pytest.fixture
def engine(base: BaseModel) -> LocalTokenEngine:
    return LocalTokenEngine(LocalEngine(base, cache_tokens=1024, tokens_per_pass=64), prefill_tokens=16)


def prompt(n: int, length: int = 9) -> tuple[int, ...]:
    return tuple((7 * n + 13 * i) % 290 for i in range(length))


def ask(engine: LocalTokenEngine, requests: Sequence[TokenRequest], *, step: Step = FREE) -> list[Says]:
    async def go() -> list[Says]:
        said = [Says(step) for _ in requests]
        await asyncio.gather(*(engine.run(r, s) for r, s in zip(requests, said, strict=True)))
        return said

    return asyncio.run(go())


def request(n: int = 0, length: int = 9, **fields: object) -> TokenRequest:
    made = {"prompt_ids": prompt(n, length), "adapter": None, "seed": n, "max_tokens": 6, **fields}
    return TokenRequest(**made)  # type: ignore[arg-type]


def reference(base: BaseModel, adapter: AdapterVersion | None, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (len(ids), vocabulary) after each token, by a plain model with the adapter merged in."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    if adapter is not None:
        held = base.bank.get(adapter)
        with torch.no_grad():
            for s in held.shapes:
                model.get_submodule(s.name).weight += (
                    held.scaling * s.b(held.flat, held.rank) @ s.a(held.flat, held.rank)
                )
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("adapter", [None, A])
def test_free_text_is_what_the_engine_itself_samples(
    engine: LocalTokenEngine, base: BaseModel, adapter: AdapterVersion | None
) -> None:
    wanted = GenerateRequest(
        prompt_ids=prompt(1), adapter=adapter, seed=5, max_tokens=12, temperature=0.8, bias={40: 2.0}, stop_ids=(10**6,)
    )
    alone = asyncio.run(LocalEngine(base, cache_tokens=512).generate(wanted))
    (said,) = ask(
        engine, [request(1, adapter=adapter, seed=5, max_tokens=12, temperature=0.8)], step=Step(bias={40: 2.0})
    )
    assert said.ids == alone.token_ids
    assert [token.logprob for token in said.tokens] == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_sequence_does_not_depend_on_its_company(engine: LocalTokenEngine, base: BaseModel) -> None:
    crowd = [request(n, length=3 + 5 * n, adapter=A if n % 2 else None, max_tokens=4 + n) for n in range(9)]
    together = ask(engine, crowd)
    for one, said in zip(crowd, together, strict=True):
        fresh = LocalTokenEngine(LocalEngine(base, cache_tokens=1024))
        (alone,) = ask(fresh, [one])
        assert alone.ids == said.ids
        assert len(said.ids) == one.max_tokens
        for a, b in zip(alone.tokens, said.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_constraints_hold_in_either_form(engine: LocalTokenEngine, base: BaseModel) -> None:
    ids = (20, 30, 45)
    many = tuple(range(10, 300))
    for allowed, steps in (
        (ids, [Step(ids=ids), Step(mask=pack(ids, base.vocabulary))]),
        (many, [Step(ids=many), Step(mask=pack(many, base.vocabulary))]),
    ):
        found = [ask(engine, [request(3, max_tokens=10, top_logprobs=2)], step=step)[0] for step in steps]
        assert found[0].ids == found[1].ids
        assert set(found[0].ids) <= set(allowed)
        row = reference(base, None, prompt(3))[-1]
        total = math.log(sum(math.exp(float(row[i])) for i in allowed))
        first = found[0].tokens[0]
        assert first.logprob == pytest.approx(float(row[first.token_id]) - total, abs=1e-4)
        assert first.top[0][1] >= first.top[1][1]


def test_a_single_allowed_token_costs_nothing(engine: LocalTokenEngine) -> None:
    (said,) = ask(engine, [request(max_tokens=5)], step=Step(ids=(33,)))
    assert said.ids == (33,) * 5
    assert {token.logprob for token in said.tokens} == {0.0}
    assert engine.engine.tokens_computed == 0


def test_the_steering_ends_a_sequence(engine: LocalTokenEngine) -> None:
    (free,) = ask(engine, [request(2, max_tokens=8)])
    stop = free.ids[3]
    says = Says(stop=stop)
    asyncio.run(engine.run(request(2, max_tokens=8), says))
    assert says.ids == free.ids[: free.ids.index(stop) + 1]


def test_what_a_steering_raises_ends_its_sequence_only(engine: LocalTokenEngine) -> None:
    class Broken(Says):
        def before(self) -> Step:
            if len(self.tokens) == 2:
                raise EngineError("enough")
            return FREE

    async def go() -> tuple[Says, object]:
        good, bad = Says(), Broken()
        _, raised = await asyncio.gather(
            engine.run(request(1), good), engine.run(request(2), bad), return_exceptions=True
        )
        return good, raised

    good, raised = asyncio.run(go())
    assert len(good.ids) == 6
    assert str(raised) == "enough"


def test_scores_are_those_of_a_plain_model(engine: LocalTokenEngine, base: BaseModel) -> None:
    ids = prompt(4, 40)  # more than one piece
    for adapter in (None, A):
        wanted = reference(base, adapter, ids)
        for _ in range(2):  # computed, then from the cache
            found = asyncio.run(engine.score(adapter, ids, 3))
            assert [token.token_id for token in found] == list(ids[1:])
            for i, token in enumerate(found):
                row = wanted[i].numpy()
                assert token.logprob == pytest.approx(float(row[ids[i + 1]]), abs=1e-4)
                assert [t for t, _ in token.top] == np.argsort(-row, kind="stable")[:3].tolist()
    assert asyncio.run(engine.score(None, ids[:1], 0)) == ()


def test_prompts_are_read_in_pieces(engine: LocalTokenEngine) -> None:
    computed = []
    forward = engine.engine._forward

    def watched(*given: object) -> None:
        before = engine.engine.tokens_computed
        forward(*given)  # type: ignore[arg-type]
        computed.append(engine.engine.tokens_computed - before)

    engine.engine._forward = watched  # type: ignore[method-assign,assignment]
    crowd = [request(n, length=70, max_tokens=3) for n in range(4)]
    ask(engine, crowd)
    assert max(computed) <= 16 + len(crowd)  # a piece of a prompt, and a token of each who is past that
    assert sum(computed) >= 4 * 70


def test_a_shared_prompt_is_read_once(engine: LocalTokenEngine) -> None:
    ask(engine, [request(5, length=60, seed=seed, max_tokens=1) for seed in range(8)])
    assert engine.engine.tokens_computed <= 60 + 8
    assert engine.stats().prefix_queries == 8 * 60
    ask(engine, [request(5, length=60)])
    assert engine.stats().prefix_hits >= 60
    assert 0 < engine.stats().cache_usage < 1


def test_the_event_loop_turns_while_it_works(engine: LocalTokenEngine) -> None:
    async def go() -> int:
        turns = 0
        work = asyncio.ensure_future(
            asyncio.gather(*(engine.run(request(n, length=200, max_tokens=4), Says()) for n in range(4)))
        )
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        await work
        return turns

    assert asyncio.run(go()) > 4 * 200 / 16  # at least once between two pieces


def test_cancelling_ends_a_sequence_and_leaves_the_others(engine: LocalTokenEngine) -> None:
    async def go() -> tuple[Says, Says]:
        gone, stays = Says(), Says()
        leaving = asyncio.ensure_future(engine.run(request(1, length=100, max_tokens=500), gone))
        staying = asyncio.ensure_future(engine.run(request(2, length=100, max_tokens=12), stays))
        while len(gone.tokens) < 3:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        said = len(gone.tokens)
        await staying
        assert len(gone.tokens) == said
        return gone, stays

    gone, stays = asyncio.run(go())
    assert len(gone.tokens) < 20
    assert len(stays.tokens) == 12


def test_cancelling_while_a_prompt_is_read_frees_its_place(engine: LocalTokenEngine) -> None:
    async def go() -> None:
        crowd = [asyncio.ensure_future(engine.run(request(n, length=300), Says())) for n in range(3)]
        await asyncio.sleep(0.01)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        says = Says()
        await asyncio.wait_for(engine.run(request(7, length=300), says), 20)
        assert len(says.tokens) == 6

    asyncio.run(go())


def test_what_does_not_fit_is_refused(engine: LocalTokenEngine) -> None:
    assert engine.context == 1024
    for wrong, said in (
        (request(length=1020), "1026 tokens, but the engine holds 1024"),
        (request(prompt_ids=()), "empty"),
        (request(adapter=AdapterVersion("nobody", 3)), "never published"),
    ):
        with pytest.raises(EngineError, match=said):
            ask(engine, [wrong])
    with pytest.raises(EngineError, match="to score"):
        asyncio.run(engine.score(None, prompt(1, 1025), 0))
    with pytest.raises(NothingAllowedError):
        ask(engine, [request()], step=Step(ids=()))


def test_adapters_are_read_from_peft_directories(engine: LocalTokenEngine, base: BaseModel, tmp_path: Path) -> None:
    save_adapter(base.bank.get(A), tmp_path / "a", base, A)
    asyncio.run(engine.load(SERVED, tmp_path / "a"))
    found = [ask(engine, [request(1, adapter=adapter)])[0] for adapter in (A, SERVED, None)]
    assert found[0].ids == found[1].ids
    assert [t.logprob for t in found[0].tokens] == pytest.approx([t.logprob for t in found[1].tokens], abs=1e-5)
    assert [t.logprob for t in found[0].tokens] != pytest.approx([t.logprob for t in found[2].tokens], abs=1e-3)
    row = base.bank.get(SERVED).row
    asyncio.run(engine.unload(SERVED))
    assert not base.bank.holds(SERVED)
    # what it held is free for the next, and nothing of it shines through
    again = AdapterVersion("served", 2)
    asyncio.run(engine.load(again, tmp_path / "a"))
    assert base.bank.get(again).row == row
    assert ask(engine, [request(1, adapter=again)])[0].ids == found[0].ids
    (tmp_path / "b").mkdir()
    with pytest.raises(AdapterError, match="not a PEFT LoRA adapter"):
        asyncio.run(engine.load(AdapterVersion("served", 3), tmp_path / "b"))
