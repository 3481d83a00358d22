"""How much work engine and learner do, counted in tokens, products and bytes: a guard that no clock can upset."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.config import LearnerConfig
from coterie.inference.local.engine import LocalEngine
from coterie.lm.base import BaseModel
from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Panels
from coterie.models import ModelConfig
from coterie.training.batch import Batch, HeadKey, Term
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, GenerateRequest
from tests.conftest import MakeBase

LAYERS, LINEARS = 3, 7


class _Products(TorchDispatchMode):
    """Counts matrix products and their floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            a, b = (args[0], args[1]) if name in ("mm", "bmm") else (args[1], args[2])
            self.calls += 1
            self.flops += 2 * a.numel() * b.shape[-1]
        elif name == "_linear_pointwise":  # with a packed matrix
            self.calls += 1
            self.flops += 2 * args[0].numel() * out.shape[-1]
        return out


@contextmanager
def _counting() -> Iterator[_Products]:
    plain = Kernels.product

    def counted(kernels: Kernels, parts: Sequence[Tensor], panels: Panels) -> Tensor:
        products.calls += 1
        products.flops += 2 * sum(part.numel() for part in parts) * panels.out
        return plain(kernels, parts, panels)

    whole = Kernels.decoder_layer

    def counted_layer(kernels: Kernels, layer: Any, work: Any, call: Any) -> None:
        described = layer._obj  # of ctypes.byref
        for group in (described.asked, described.mixed, described.inner, described.outer):
            products.calls += 1
            products.flops += 2 * work._obj.tokens * group.size * group.out
        whole(kernels, layer, work, call)

    patched = patch.object(Kernels, "product", counted), patch.object(Kernels, "decoder_layer", counted_layer)
    with _Products() as products, patched[0], patched[1]:
        yield products


def _add(base: BaseModel, count: int, rank: int = 8) -> list[AdapterVersion]:
    for number in range(count):
        adapter = base.bank.add(f"m{number}", rank, 16.0, number)
        with torch.no_grad():
            adapter.flat.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    return [AdapterVersion(f"m{number}", 0) for number in range(count)]


def _serve(engine: LocalEngine, requests: list[GenerateRequest]) -> _Products:
    async def go() -> None:
        await asyncio.gather(*(engine.generate(r) for r in requests))

    with _counting() as products:
        asyncio.run(go())
    return products


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple((7 * seed + 13 * i) % 290 for i in range(length))


def test_tokens_computed_are_the_distinct_ones(tiny_base: BaseModel) -> None:
    versions = _add(tiny_base, 2)
    engine = LocalEngine(tiny_base)
    requests = [
        GenerateRequest(_prompt(0, 50), versions[k % 2], seed=k, max_tokens=5, stop_ids=(10_000,)) for k in range(32)
    ]
    _serve(engine, requests)
    # each adapter's prompt once; of an answer all but its last token, at most
    assert engine.tokens_computed <= 2 * 50 + 32 * 4


def test_choices_ask_only_the_allowed_rows_of_the_output_matrix(tiny_base: BaseModel) -> None:
    engine = LocalEngine(tiny_base)
    prompt = _prompt(1, 20)
    whole = _serve(engine, [GenerateRequest(prompt, None, seed=1, max_tokens=1, stop_ids=(10_000,))]).flops
    engine.cache.clear()
    few = _serve(engine, [GenerateRequest(prompt, None, seed=1, choices=((10,), (11,)))]).flops
    # the rows themselves, and, where kernels do not do it, two operations an entry for the entropy of the whole row
    entropy = 0 if tiny_base.kernels is not None else 2 * tiny_base.vocabulary
    assert whole - few == 2 * tiny_base.hidden_size * (tiny_base.vocabulary - 2) + entropy


def test_a_decoding_step_costs_few_products_however_many_rows_and_adapters(tiny_base: BaseModel) -> None:
    versions = _add(tiny_base, 12)
    engine = LocalEngine(tiny_base)

    def step(rows: int, adapters: int) -> int:
        found = []
        for tokens in (1, 2):
            engine.cache.clear()
            ask = [
                GenerateRequest(
                    _prompt(k % adapters, 30), versions[k % adapters], seed=k, max_tokens=tokens, stop_ids=(10_000,)
                )
                for k in range(rows)
            ]
            found.append(_serve(engine, ask).calls)
        return found[1] - found[0]

    # two products a layer for own keys, two for a shared prompt; adapters add two a linear layer, all of them together
    assert step(32, 12) <= LAYERS * (LINEARS * 3 + 2 + 2 * 12) + 2
    assert step(32, 1) <= LAYERS * (LINEARS * 3 + 4) + 2
    assert step(48, 1) == step(32, 1)


def _batch(policies: int, siblings: int, prompt: int, answer: int) -> Batch:
    sequences = tuple(
        (policy, _prompt(policy, prompt) + tuple(100 + (k + i * 7) % 150 for i in range(answer)))
        for policy in range(policies)
        for k in range(siblings)
    )
    terms = tuple(Term(i, len(tokens) - 1, 10, -1.0, 1.0, 0.0, 1) for i, (_, tokens) in enumerate(sequences))
    names = tuple(f"m{n}" for n in range(policies))
    return Batch(names, sequences, {HeadKey((10, 11), (), 1.0): terms}, (siblings,) * policies)


def _learn(base: BaseModel, policies: int, siblings: int) -> tuple[_Products, int]:
    models = [ModelConfig(model_id=f"m{n}", lora_rank=8) for n in range(policies)]
    learner = Learner(base, models, LearnerConfig(), 1)
    batch = _batch(policies, siblings, 40, 4)
    with _counting() as products:
        stats = learner.step(batch, 1)
    return products, stats.packed_tokens


def test_sixteen_policies_cost_the_learner_what_one_does(tiny_base: BaseModel) -> None:
    _add(tiny_base, 16)
    one, packed_one = _learn(tiny_base, 1, 16)
    many, packed_many = _learn(tiny_base, 16, 1)
    assert packed_one == 40 + 16 * 4
    assert packed_many == 16 * 44
    assert many.flops / packed_many <= 1.1 * one.flops / packed_one


def test_only_terms_reach_the_output_matrix(tiny_base: BaseModel) -> None:
    _add(tiny_base, 1)
    products, packed = _learn(tiny_base, 1, 8)
    parameters = sum(fan_in * fan_out for _, fan_in, fan_out in tiny_base.bank.sizes)
    lora = sum(8 * (fan_in + fan_out) for _, fan_in, fan_out in tiny_base.bank.sizes)
    # forward and the way back to the inputs: 4 operations a weight and token; adapters also get their own gradient
    linear = packed * (4 * parameters + 6 * lora)
    # attention: two products forward, five back (the probabilities once more), of all tokens with each other at most
    width = tiny_base.heads * tiny_base.head_dim
    attention = 7 * 2 * packed**2 * width * tiny_base.layers
    assert products.flops <= linear * 1.05 + attention


@pytest.mark.parametrize("rank", [8, 16])
def test_a_policy_adds_its_weights_gradient_and_two_moments(tiny_base: BaseModel, rank: int) -> None:
    size = sum(rank * (fan_in + fan_out) for _, fan_in, fan_out in tiny_base.bank.sizes)
    adapter = tiny_base.bank.add("m0", rank, 16.0, 0)
    learner = Learner(tiny_base, [ModelConfig(model_id="m0", lora_rank=rank)], LearnerConfig(), 1)
    learner.step(_batch(1, 2, 10, 2), 1)
    state = [t for name, t in learner.state().items() if name.startswith("m0/") and t.numel() > 1]
    assert adapter.flat.numel() == size
    assert adapter.grad is not None
    assert adapter.grad.numel() == size
    assert sorted(t.numel() for t in state) == [size] * 3  # weights and both moments


def _held() -> int:
    """Bytes of all tensors that somebody still holds, but for matrices packed by oneDNN, which are the base's."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.layout is torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_added_policy_holds_little_beside_its_state(make_base: MakeBase, dtype: str) -> None:
    """What engine and learner keep of it from pass to pass: copies of the factors in the base's type, once."""
    base = make_base(dtype=dtype)
    models = [ModelConfig(model_id=f"m{n}", lora_rank=8) for n in range(9)]
    learner = Learner(base, [], LearnerConfig(), 9)
    engine = LocalEngine(base, cache_tokens=2000)

    def held(count: int) -> int:
        for model in models[len(learner.models) : count]:
            base.bank.add(model.model_id, 8, 16.0, 0)
            learner.add(model)
        versions = [AdapterVersion(model.model_id, 0) for model in models[:count]]
        for update in (1, 2):
            ask = [GenerateRequest(_prompt(k, 20), v, seed=k, max_tokens=2) for k, v in enumerate(versions)]
            _serve(engine, ask)
            learner.step(_batch(count, 2, 10, 2), update)
        _serve(engine, ask)
        return _held()

    one, nine = held(1), held(9)
    size = sum(8 * (fan_in + fan_out) for _, fan_in, fan_out in base.bank.sizes)
    # the weights themselves are rows of a pool that is there from the first policy on
    assert 3 * 4 * size < (nine - one) / 8 <= (1.15 * 4 - 1) * 4 * size


def test_the_cache_is_as_large_as_its_slots_and_no_larger(tiny_base: BaseModel) -> None:
    engine = LocalEngine(tiny_base, cache_tokens=300)
    size = sum(t.numel() * t.element_size() for t in (*engine.cache.keys, *engine.cache.values))
    assert size == 2 * LAYERS * 300 * tiny_base.kv_heads * tiny_base.head_dim * 4
    _serve(engine, [GenerateRequest(_prompt(k, 40), None, seed=k, max_tokens=8) for k in range(30)])
    assert sum(t.numel() * t.element_size() for t in (*engine.cache.keys, *engine.cache.values)) == size
