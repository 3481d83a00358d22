"""Engine and learner agree on log-probabilities, so in-process data is exactly on-policy, or to bfloat16's rounding."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from coterie.config import LearnerConfig
from coterie.inference.local.engine import LocalEngine
from coterie.models import ModelConfig
from coterie.training.batch import build_batch
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, Advantages, GenerateRequest, Generation
from tests.conftest import MakeBase
from tests.support.episodes import episode, make_turn

CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15))
MODELS = (ModelConfig(model_id="a", lora_rank=3), ModelConfig(model_id="b", lora_rank=6))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize(
    ("choices", "bias", "temperature"),
    [(None, None, 1.0), (None, None, 0.6), (CHOICES, None, 1.0), (CHOICES, {11: 1.2, 15: -0.8}, 1.4)],
    ids=["text", "cooler text", "choices", "biased choices"],
)
def test_learner_finds_the_log_probabilities_the_engine_sampled_with(
    make_base: MakeBase,
    choices: tuple[tuple[int, ...], ...] | None,
    bias: dict[int, float] | None,
    temperature: float,
    dtype: str,
    most: float,
) -> None:
    base = make_base(dtype=dtype)
    for number, m in enumerate(MODELS):
        adapter = base.bank.add(m.model_id, m.lora_rank, m.lora_alpha, number)
        with torch.no_grad():
            adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(number)))
    engine = LocalEngine(base)
    requests = [
        GenerateRequest(
            tuple((5 * n + 11 * i) % 290 for i in range(4 + n % 5)), AdapterVersion("ab"[n % 2], 0), seed=n,
            max_tokens=5, choices=choices, bias=bias, temperature=temperature,
        )
        for n in range(24)
    ]  # fmt: skip

    async def ask() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(r) for r in requests)))

    episodes = []
    for n, (request, made) in enumerate(zip(requests, asyncio.run(ask()), strict=True)):
        turn = make_turn(
            "seat", model_id="ab"[n % 2], prompt_ids=made.prompt_ids, token_ids=made.token_ids, allowed=made.allowed,
            logprobs=made.logprobs, bias=request.bias, temperature=request.temperature,
        )  # fmt: skip
        e = episode(f"e{n}", scores={"seat": 1.0})
        episodes.append(replace(e, trajectories={"seat": replace(e.trajectories["seat"], turns=(turn,))}))
    advantages = Advantages({e.episode_id: {"seat": (1.0,)} for e in episodes})
    learner = Learner(base, MODELS, LearnerConfig(), 1)
    stats = learner.step(build_batch(["a", "b"], episodes, advantages, keep_zero=False), 1)
    for s in stats.policies.values():
        assert s.tokens > 0
        assert s.mismatch < most
        assert s.max_ratio == pytest.approx(1.0, abs=10 * most)
