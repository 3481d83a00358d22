"""The models of a run as weights: what the learner tells a server's canary."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch

from coterie.config import parse_config
from coterie.environment import MultiModelEnvironment
from coterie.inference.canary import PROBE_IDS, Probe, check_probe, distance
from coterie.lm.tiny import tiny_random
from coterie.models import LoRAModel, ModelConfig
from coterie.training.policies import TrainedPolicies, scarcity
from coterie.types import AdapterVersion, GenerateRequest


@pytest.fixture
def policies(tmp_path: Path) -> TrainedPolicies:
    base = {"model": str(tiny_random(tmp_path)), "dtype": "float32"}
    models = [LoRAModel(ModelConfig(model_id=name, lora_rank=4)) for name in ("a", "b")]
    return TrainedPolicies(parse_config({"base": base}), models, len)


def change(policies: TrainedPolicies, model_id: str, noise: float) -> None:
    adapter = policies.base.bank.training(model_id)
    with torch.no_grad():
        adapter.flat.add_(noise * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
    adapter.touch()


def engine_says(policies: TrainedPolicies, version: AdapterVersion | None, probe: Probe) -> tuple[float, ...]:
    """The same, from the engine inside the process, by the way turns go."""
    choices = tuple((token,) for token in probe.allowed)
    asked = GenerateRequest(probe.prompt, version, seed=0, choices=choices, distribution=True)
    probs = asyncio.run(policies.local.generate(asked)).choice_probs
    assert probs is not None
    return tuple(map(math.log, probs))


def test_the_canary_is_told_what_the_engine_says_under_the_adapter(policies: TrainedPolicies) -> None:
    untrained = policies.probe(AdapterVersion("a", 0))
    assert untrained.logprobs == pytest.approx(engine_says(policies, None, untrained), abs=1e-5)
    change(policies, "a", 0.2)
    version = AdapterVersion("a", 1)
    probe = policies.probe(version)
    asyncio.run(policies.local.publish(version, None))
    assert probe.logprobs == pytest.approx(engine_says(policies, version, probe), abs=1e-5)
    assert distance(probe.logprobs, untrained.logprobs) > 0.1
    assert policies.probe(AdapterVersion("b", 1)) == untrained  # another model's adapter changes nothing


def test_every_probe_asks_the_same(policies: TrainedPolicies) -> None:
    first = policies.probe(AdapterVersion("a", 0))
    change(policies, "a", 0.2)
    second = policies.probe(AdapterVersion("a", 1))
    check_probe(second)
    assert (first.prompt, first.allowed) == (second.prompt, second.allowed)
    assert len(second.allowed) == PROBE_IDS
    assert not set(second.allowed) & set(policies.base.chat.stop_ids)


def test_a_step_far_below_the_tolerance_still_changes_every_number(policies: TrainedPolicies) -> None:
    before = policies.probe(AdapterVersion("a", 0)).logprobs
    change(policies, "a", 1e-5)
    after = policies.probe(AdapterVersion("a", 1)).logprobs
    assert 0 < distance(before, after) < 1e-3
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(("kept", "free"), [(6 * 10**9, None), (6 * 10**9, 6 * 10**9), (0, 0)])
def test_memory_that_suffices_is_not_spoken_of(kept: int, free: int | None) -> None:
    assert scarcity(kept, free) == ""


def said_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **learner: bool
) -> tuple[list[str], list[str]]:
    """While models are measured, and while they are trained, two updates one by one."""
    monkeypatch.setattr("coterie.training.policies.free_memory", lambda: 10**8)
    environment = MultiModelEnvironment(
        config=parse_config({
            "base": {"model": str(tiny_random(tmp_path)), "dtype": "float32"}, "learner": learner,
            "models": [{"model_id": "a"}, {"model_id": "b"}], "scenario": {"id": "signaling"},
            "engine": {"activations_mb": 2500, "calibration": False},
            "rollout": {"tasks_per_update": 2, "group_size": 2},
        })
    )  # fmt: skip

    def warnings() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "activations" in record.getMessage()]
        caplog.clear()
        return found

    async def go() -> tuple[list[str], list[str]]:
        await environment.measure(2)
        measuring = warnings()
        for _ in range(2):
            await environment.train_cycles(1)
        return measuring, warnings()

    with caplog.at_level("WARNING"):
        return asyncio.run(go())


def test_a_learner_that_keeps_nothing_needs_no_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said_of_memory(tmp_path, monkeypatch, caplog, gradient_checkpointing=True) == ([], [])


def test_memory_that_may_not_suffice_is_spoken_of_once_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measuring, (said,) = said_of_memory(tmp_path, monkeypatch, caplog)
    assert measuring == []
    assert "up to 2.5 GB" in said
    assert "only 0.1 GB of memory are free" in said
    assert "set engine.activations_mb lower" in said
