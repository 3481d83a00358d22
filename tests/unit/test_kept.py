"""What rollout computed serves the learner: the same gradients without a forward pass, never under other weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from coterie.config import LearnerConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.inference.local.engine import LocalEngine
from coterie.lm import attention, bank, products
from coterie.lm import base as base_module
from coterie.lm.base import BaseModel
from coterie.lm.linear import Siblings
from coterie.lm.products import OutputMatrix
from coterie.lm.tiny import FAMILIES, tiny_random
from coterie.models import ModelConfig
from coterie.monitor.metrics import UpdateRecord
from coterie.training.base import LearnerStats, StepStats
from coterie.training.batch import Batch
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, GenerateRequest, Generation
from tests.conftest import MakeBase
from tests.support.compiled import need_kernels
from tests.support.episodes import batch_of

CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15))
MODELS = (ModelConfig(model_id="a", lora_rank=3), ModelConfig(model_id="b", lora_rank=24))
"""One rank that compiled kernels serve, and one that matrix products do."""
PLENTY = 10**9


def _stirred(base: BaseModel) -> BaseModel:
    for number, m in enumerate(MODELS):
        adapter = base.bank.add(m.model_id, m.lora_rank, m.lora_alpha, number)
        with torch.no_grad():
            adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(number)))
        base.bank.publish(AdapterVersion(m.model_id, 0))
    return base


def _requests() -> list[GenerateRequest]:
    """Prompts that several ask, second turns after first ones, free text and choices, of two policies."""
    made = []
    for n in range(24):
        prompt = tuple((5 * (n // 3) + 11 * i) % 290 for i in range(4 + n % 5))
        choices = CHOICES if n % 4 == 0 else None
        adapter = AdapterVersion("ab"[n % 2], 0)
        made.append(GenerateRequest(prompt, adapter, seed=n, max_tokens=5, choices=choices, stop_ids=(10_000,)))
    return made


async def _two_turns(engine: LocalEngine) -> list[Generation]:
    first = list(await asyncio.gather(*(engine.generate(r) for r in _requests())))
    later = [
        GenerateRequest((*made.prompt_ids, *made.token_ids, 7, 8), made.adapter, seed=100 + n, max_tokens=3)
        for n, made in enumerate(first)
    ]
    return first + list(await asyncio.gather(*(engine.generate(r) for r in later)))


def _played(base: BaseModel, kept_bytes: int = PLENTY, **options: int) -> tuple[LocalEngine, Batch]:
    engine = LocalEngine(base, kept_bytes=kept_bytes, **options)
    with engine.kept.listening():
        answers = asyncio.run(_two_turns(engine))
    return engine, batch_of(answers, ["a", "b"])


def _gradients(base: BaseModel, learner: Learner, batch: Batch) -> tuple[list[torch.Tensor], LearnerStats]:
    stats = LearnerStats({name: StepStats() for name in batch.policies})
    learner.backward(batch, stats)
    found = []
    for m in MODELS:
        grad = base.bank.training(m.model_id).grad
        assert grad is not None
        found.append(grad.clone())
    return found, stats


@contextmanager
def _products() -> Iterator[tuple[list[int], list[int]]]:
    """Rows that go forward through the layers' matrices, and through the output matrix."""
    layers: list[int] = []
    outputs: list[int] = []
    through, out = Siblings.products, OutputMatrix.__call__

    def counted(siblings: Siblings, x: torch.Tensor) -> Sequence[torch.Tensor]:
        layers.append(len(x))
        return through(siblings, x)

    def counted_out(matrix: OutputMatrix, hidden: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        if known is None:
            outputs.append(len(hidden))
        return out(matrix, hidden, known)

    with patch.object(Siblings, "products", counted), patch.object(OutputMatrix, "__call__", counted_out):
        yield layers, outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "composed"])
@pytest.mark.parametrize("layers", [1.0, 0.5], ids=["all layers", "upper layers"])
def test_gradients_are_those_of_a_forward_pass(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch, dtype: str, compiled: bool, layers: float
) -> None:
    if compiled:
        need_kernels(getattr(torch, dtype))
    else:
        for module in (base_module, attention, bank, products):
            monkeypatch.setattr(module, "kernels_for", lambda dtype, device: None)
    base = _stirred(make_base(dtype=dtype, lora_layers=layers))
    assert (base.kernels is not None) == compiled
    engine, batch = _played(base)
    anew, plain = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), batch)
    with _products() as (rows, outputs):
        recalled, stats = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept), batch)
    assert rows == []
    # where nothing is compiled, sampling writes over the logits
    assert bool(outputs) != compiled
    assert plain.recalled_tokens == 0
    assert stats.recalled_tokens == stats.packed_tokens == plain.packed_tokens > 100
    for ours, theirs in zip(recalled, anew, strict=True):
        close = 1e-5 if dtype == "float32" else 0.05
        assert (ours - theirs).norm() <= close * theirs.norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recalls(tmp_path: Path, make_base: MakeBase, family: str) -> None:
    path = tiny_random(tmp_path / family, seed=3, family=family)  # type: ignore[arg-type]
    base = _stirred(make_base(model=str(path)))
    engine, batch = _played(base)
    anew, _ = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), batch)
    recalled, stats = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept), batch)
    assert stats.recalled_tokens == stats.packed_tokens
    for ours, theirs in zip(recalled, anew, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() > 0


def test_a_run_recalls_and_learns_the_same(tiny_path: Path) -> None:
    def trained(megabytes: int | None) -> tuple[list[UpdateRecord], torch.Tensor]:
        config = parse_config(
            {
                "updates": 3, "seed": 4, "mode": "competitive", "models": [{"model_id": "a"}, {"model_id": "b"}],
                "base": {"model": str(tiny_path), "threads": 1, "dtype": "float32"},
                "engine": {"activations_mb": megabytes}, "credit": {"scheme": "magnetic"},
                "scenario": {"id": "matrix", "options": {"game": "prisoners_dilemma", "rounds": 2}},
                "rollout": {"tasks_per_update": 2, "group_size": 6}, "evaluation": {"tasks": 0},
            }
        )  # fmt: skip
        environment = MultiModelEnvironment(config=config)
        try:
            records = asyncio.run(environment.train_cycles(3))
            flat = torch.cat([environment.base.bank.training(name).flat.detach().clone() for name in ("a", "b")])
        finally:
            asyncio.run(environment.aclose())
        return records, flat

    with_them, ours = trained(None)
    without, theirs = trained(0)
    for one, other in zip(with_them, without, strict=True):
        packed = one.metrics["learn/packed_tokens"]
        assert one.metrics["learn/recalled_tokens"] == packed == other.metrics["learn/packed_tokens"] > 0
        assert other.metrics["learn/recalled_tokens"] == 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_parts_of_an_update_are_recalled_by_themselves(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base, tokens_per_pass=32)
    anew, _ = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), batch)
    small = LearnerConfig(tokens_per_pass=40)
    recalled, stats = _gradients(base, Learner(base, MODELS, small, 1, kept=engine.kept), batch)
    assert stats.recalled_tokens == stats.packed_tokens
    for ours, theirs in zip(recalled, anew, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_nothing_is_recalled_of_weights_that_changed(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base)
    learner = Learner(base, MODELS, LearnerConfig(passes=2), 1, kept=engine.kept)
    with _products() as (rows, _):
        stats = learner.step(batch, 1)
    # the first pass over the update recalls, the second is after the first step
    assert stats.recalled_tokens == stats.packed_tokens / 2
    assert rows
    assert learner.step(batch, 2).recalled_tokens == 0


def test_publication_lets_go_of_what_was_kept(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base)
    assert engine.cache.activations.passes
    asyncio.run(engine.publish(AdapterVersion("a", 1), None))
    assert not engine.cache.activations.passes
    learner = Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept)
    assert _gradients(base, learner, batch)[1].recalled_tokens == 0


def test_what_is_played_unheard_is_not_kept(make_base: MakeBase) -> None:
    engine = LocalEngine(_stirred(make_base()), kept_bytes=PLENTY)
    asyncio.run(_two_turns(engine))
    assert not engine.cache.activations.passes


def test_memory_is_bounded_and_what_is_missing_is_computed(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base, 400_000, tokens_per_pass=32)
    (first, *_), number = engine.cache.activations.passes, len(engine.cache.activations.passes)
    per_token = first.nbytes // len(first.layers[0].x)
    held = sum(len(made.layers[0].x) for made in engine.cache.activations.passes) * per_token
    assert 400_000 <= held <= 400_000 + 32 * per_token
    assert number > 1
    anew, _ = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), batch)
    with _products() as (rows, _):
        recalled, stats = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept), batch)
    # what is missing goes through the layers, and nothing else
    assert 0 < stats.recalled_tokens < stats.packed_tokens
    assert max(rows) == stats.packed_tokens - stats.recalled_tokens
    for ours, theirs in zip(recalled, anew, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_not_computed_beside_an_engine_at_work(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base, 400_000, tokens_per_pass=32)
    learner = Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept)
    # as the loop does where turns come from servers: the engine may be asked in the meantime
    assert asyncio.run(asyncio.to_thread(learner.step, batch, 1)).recalled_tokens == 0


def test_a_cache_that_forgets_takes_its_activations_with_it(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base, cache_tokens=48, tokens_per_pass=16)
    anew, _ = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), batch)
    recalled, stats = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept), batch)
    assert stats.recalled_tokens < stats.packed_tokens
    for ours, theirs in zip(recalled, anew, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpointing_asks_for_nothing(make_base: MakeBase) -> None:
    engine = LocalEngine(_stirred(make_base()), kept_bytes=PLENTY)
    learner = Learner(engine.base, MODELS, LearnerConfig(gradient_checkpointing=True), 1, kept=engine.kept)
    with learner.listening():
        batch = batch_of(asyncio.run(_two_turns(engine)), ["a", "b"])
    assert not engine.cache.activations.passes
    assert learner.step(batch, 1).recalled_tokens == 0


def test_without_an_engine_there_is_nothing_to_listen_to(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    _, batch = _played(base)
    learner = Learner(base, MODELS, LearnerConfig(), 1)
    with learner.listening():
        assert learner.step(batch, 1).recalled_tokens == 0


def test_an_answer_the_engine_did_not_give_is_computed(make_base: MakeBase) -> None:
    base = _stirred(make_base())
    engine, batch = _played(base)
    (policy, tokens), *rest = batch.sequences
    foreign = replace(batch, sequences=((policy, (299, *tokens[1:])), *rest))
    anew, _ = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1), foreign)
    recalled, stats = _gradients(base, Learner(base, MODELS, LearnerConfig(), 1, kept=engine.kept), foreign)
    assert stats.packed_tokens - stats.recalled_tokens == len(tokens)
    for ours, theirs in zip(recalled, anew, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
