"""A whole layer in one call gives the numbers of its parts called one by one; on the way to answers bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from coterie.config import LearnerConfig
from coterie.inference.local.engine import LocalEngine
from coterie.lm.base import BaseModel
from coterie.lm.native.kernels import Kernels
from coterie.models import ModelConfig
from coterie.training.base import LearnerStats, StepStats
from coterie.training.batch import Batch
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, GenerateRequest, Generation
from tests.conftest import MakeBase
from tests.support.compiled import need_kernels
from tests.support.episodes import batch_of

LAYERS = 3


def _stirred(base: BaseModel, ranks: dict[str, int]) -> BaseModel:
    for number, (name, rank) in enumerate(ranks.items()):
        adapter = base.bank.add(name, rank, 2.0 * rank, number)
        with torch.no_grad():
            adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(number)))
        base.bank.publish(AdapterVersion(name, 0))
    return base


def _requests(names: list[str | None]) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            tuple((5 * (n // 3) + 11 * i) % 290 for i in range(3 + n % 7)),
            None if names[n % len(names)] is None else AdapterVersion(str(names[n % len(names)]), 0),
            seed=n, max_tokens=6, stop_ids=(10_000,),
        )
        for n in range(21)
    ]  # fmt: skip


def _answers(base: BaseModel, names: list[str | None], *, keep: bool) -> tuple[list[Generation], LocalEngine]:
    engine = LocalEngine(base, kept_bytes=10**9, tokens_per_pass=40)

    async def ask() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(r) for r in _requests(names))))

    if not keep:
        return asyncio.run(ask()), engine
    with engine.kept.listening():
        return asyncio.run(ask()), engine


@contextmanager
def _part_by_part(base: BaseModel) -> Iterator[None]:
    assert base.kernels is not None
    base.kernels.telling = True
    try:
        yield
    finally:
        base.kernels.telling = False


@contextmanager
def _calls() -> Iterator[list[int]]:
    """[whole layers, products]"""
    counted = [0, 0]
    whole, product = Kernels.decoder_layer, Kernels.product

    def one(*given: object) -> None:
        counted[0] += 1
        whole(*given)  # type: ignore[arg-type]

    def another(*given: object) -> torch.Tensor:
        counted[1] += 1
        return product(*given)  # type: ignore[arg-type]

    with patch.object(Kernels, "decoder_layer", one), patch.object(Kernels, "product", another):
        yield counted


@pytest.mark.parametrize("keep", [False, True], ids=["forgotten", "kept"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("ranks", "names", "fields"),
    [
        ({}, [None], {}),
        ({"a": 4, "b": 16}, ["a", None, "b"], {}),
        ({"a": 4}, ["a"], {"lora_targets": ("q_proj", "v_proj", "down_proj")}),
        ({"a": 4}, ["a", None], {"lora_layers": 0.5}),
    ],
    ids=["base", "two adapters and the base", "some targets", "upper layers"],
)
def test_a_whole_layer_is_the_sum_of_its_parts(
    make_base: MakeBase,
    ranks: dict[str, int],
    names: list[str | None],
    fields: dict[str, object],
    threads: int,
    keep: bool,
) -> None:
    need_kernels()
    before = torch.get_num_threads()
    base = _stirred(make_base(threads=threads, **fields), ranks)
    try:
        with _calls() as counted, _part_by_part(base):
            apart, first = _answers(base, names, keep=keep)
            assert counted[0] == 0
        with _calls() as counted:
            together, second = _answers(base, names, keep=keep)
            # one call a layer, and the output matrix a step
            assert counted[0] > 0
            assert counted[0] % LAYERS == 0
            assert counted[1] <= counted[0] / LAYERS
    finally:
        torch.set_num_threads(before)
    for one, other in zip(apart, together, strict=True):
        assert (one.token_ids, one.logprobs, one.entropy) == (other.token_ids, other.logprobs, other.entropy)
    for pool, same in zip(
        (*first.cache.keys, *first.cache.values), (*second.cache.keys, *second.cache.values), strict=True
    ):
        assert torch.equal(pool, same)
    passes = first.cache.activations.passes, second.cache.activations.passes
    assert len(passes[0]) == len(passes[1])
    assert bool(passes[0]) == keep
    for made, same_made in zip(*passes, strict=True):
        assert made.last is not None
        assert same_made.last is not None
        assert torch.equal(made.last, same_made.last)
        for layer, same_layer in zip(made.layers, same_made.layers, strict=True):
            for tensor, same in zip(layer.tensors(), same_layer.tensors(), strict=True):
                assert torch.equal(tensor, same)


def test_ranks_that_kernels_do_not_serve_go_part_by_part(make_base: MakeBase) -> None:
    need_kernels()
    base = _stirred(make_base(), {"a": 24})
    with _calls() as counted:
        _answers(base, ["a"], keep=False)
    assert counted[0] == 0
    assert counted[1] > 0


def _gradients(base: BaseModel, models: Sequence[ModelConfig], engine: LocalEngine, batch: Batch) -> list[torch.Tensor]:
    learner = Learner(base, models, LearnerConfig(tokens_per_pass=60), 1, kept=engine.kept)
    stats = LearnerStats({name: StepStats() for name in batch.policies})
    learner.backward(batch, stats)
    assert stats.recalled_tokens == stats.packed_tokens > 60
    found = []
    for m in models:
        grad = base.bank.training(m.model_id).grad
        assert grad is not None
        found.append(grad.clone())
    return found


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        ({"a": 4, "b": 16}, {}),
        ({"a": 1, "b": 3, "c": 8}, {}),
        ({"a": 4}, {"lora_targets": ("q_proj", "v_proj", "down_proj")}),
        ({"a": 4}, {"lora_targets": ("up_proj", "k_proj")}),
        ({"a": 4, "b": 4}, {"lora_layers": 0.5}),
    ],
    ids=["two ranks", "three", "some targets", "other targets", "upper layers"],
)
def test_the_way_back_through_whole_layers(
    make_base: MakeBase, ranks: dict[str, int], fields: dict[str, object]
) -> None:
    need_kernels()
    before = torch.get_num_threads()
    models = [ModelConfig(model_id=name, lora_rank=rank, lora_alpha=2.0 * rank) for name, rank in ranks.items()]
    base = _stirred(make_base(threads=1, **fields), ranks)
    answers, engine = _answers(base, list(ranks), keep=True)
    batch = batch_of(answers, list(ranks))
    with _part_by_part(base):
        apart = _gradients(base, models, engine, batch)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with patch.object(Kernels, "attend_tree_backward", side_effect=AssertionError("a part was called")):
                first, second = (_gradients(base, models, engine, batch) for _ in range(2))
            for ours, again, theirs in zip(first, second, apart, strict=True):
                assert torch.equal(ours, again)
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm() > 0
    finally:
        torch.set_num_threads(before)
