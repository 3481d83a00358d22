"""The learner against plain PEFT, one sequence at a time, and its invariants."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from coterie.config import LearnerConfig
from coterie.credit.base import Magnet
from coterie.errors import RunFolderError
from coterie.lm.base import BaseModel
from coterie.lm.tiny import FAMILIES, tiny_random
from coterie.models import ModelConfig
from coterie.training.batch import build_batch
from coterie.training.learner import Learner, LearnerStats
from coterie.types import Advantages, Episode, Tier, Turn
from tests.conftest import MakeBase
from tests.support.episodes import episode, make_turn

MODELS = (
    ModelConfig(model_id="low", lora_rank=2, lora_alpha=4, learning_rate=1e-3),
    ModelConfig(model_id="middle", lora_rank=5, lora_alpha=20, learning_rate=2e-3),
    ModelConfig(model_id="high", lora_rank=8, lora_alpha=8, learning_rate=5e-4),
)
BIAS = {20: 0.7, 30: -0.4, 41: 0.2}


def _noisy(base: BaseModel, models: Sequence[ModelConfig] = MODELS) -> None:
    """Adapters with B different from zero, so that gradients of A are not trivially zero."""
    for number, m in enumerate(models):
        adapter = base.bank.add(m.model_id, m.lora_rank, m.lora_alpha, number)
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            adapter.flat.add_(0.05 * torch.randn(adapter.flat.shape, generator=generator))


def _turns(rng: random.Random, model_id: str) -> list[Turn]:
    """Turns that share prefixes: free text and choices, several temperatures, with and without bias."""
    trunk = tuple(rng.randrange(300) for _ in range(6))
    made = []
    for _ in range(4):
        prompt = trunk + tuple(rng.randrange(300) for _ in range(rng.randrange(1, 4)))
        for _ in range(2):
            tokens = tuple(rng.randrange(300) for _ in range(rng.randrange(1, 4)))
            free = make_turn(
                model_id, model_id=model_id, prompt_ids=prompt, token_ids=tokens, temperature=rng.choice((1.0, 0.7)),
                logprobs=tuple(-rng.random() for _ in tokens),
            )  # fmt: skip
            allowed = ((10, 20, 30), (40, 41), (50,))
            picked = tuple(rng.choice(a) for a in allowed)
            choice = replace(
                free, token_ids=picked, allowed=allowed, bias=rng.choice((None, BIAS)), logprobs=(-1.0, -0.5, 0.0)
            )
            made += [free, choice]
    return made


def _episodes() -> tuple[list[Episode], Advantages]:
    rng = random.Random(3)
    episodes, values = [], {}
    turns = {m.model_id: _turns(rng, m.model_id) for m in MODELS}
    for n in range(16):
        made = episode(f"e{n}", scores={m.model_id: 0.5 for m in MODELS})
        made = replace(
            made,
            trajectories={
                m.model_id: replace(made.trajectories[m.model_id], model_id=m.model_id, turns=(turns[m.model_id][n],))
                for m in MODELS
            },
        )
        episodes.append(made)
        values[made.episode_id] = {m.model_id: (rng.uniform(-1, 1),) for m in MODELS}
    return episodes, Advantages(values)


def _peft(base: BaseModel, m: ModelConfig) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    config = LoraConfig(
        r=m.lora_rank, lora_alpha=m.lora_alpha, target_modules=list(base.bank.targets), task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    adapter = base.bank.training(m.model_id)
    for shape in adapter.shapes:
        layer = wrapped.base_model.model.get_submodule(shape.name)
        layer.lora_A["default"].weight.data.copy_(shape.a(adapter.flat, adapter.rank))
        layer.lora_B["default"].weight.data.copy_(shape.b(adapter.flat, adapter.rank))
    return wrapped


Pull = tuple[float, PeftModel]
"""(coefficient, what the policy is held near)."""


def _naive_loss(
    model: PeftModel, turn: Turn, advantage: float, config: LearnerConfig, pulls: Sequence[Pull] = ()
) -> torch.Tensor:
    """One turn's loss, written straight from the formulas."""
    ids = torch.tensor([turn.prompt_ids + turn.token_ids])
    logits = model(ids).logits[0]
    total = torch.zeros(())
    for j, token in enumerate(turn.token_ids):
        allowed = turn.allowed[j] if turn.allowed else tuple(range(logits.shape[-1]))
        row = logits[len(turn.prompt_ids) + j - 1]
        if turn.bias:
            row = row + torch.tensor([turn.bias.get(i, 0.0) for i in range(len(row))])
        logp = (row[list(allowed)] / turn.temperature).log_softmax(-1)
        if len(allowed) == 1:
            continue
        new = logp[allowed.index(token)]
        ratio = (new - turn.logprobs[j]).exp()
        if config.loss == "clipped":
            value = torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
        else:
            value = advantage * ratio.detach().clamp(max=2.0) * new
        if config.entropy_bonus:
            value = value - config.entropy_bonus * (logp.exp() * logp).sum()
        if config.kl_coefficient:
            with torch.no_grad(), model.disable_adapter():
                base_row = model(ids).logits[0, len(turn.prompt_ids) + j - 1]
            if turn.bias:
                base_row = base_row + torch.tensor([turn.bias.get(i, 0.0) for i in range(len(base_row))])
            reference = (base_row[list(allowed)] / turn.temperature).log_softmax(-1)
            value = value - config.kl_coefficient * (logp.exp() * (logp - reference)).sum()
        for coefficient, other in pulls:
            with torch.no_grad():
                other_row = other(ids).logits[0, len(turn.prompt_ids) + j - 1]
            if turn.bias:
                other_row = other_row + torch.tensor([turn.bias.get(i, 0.0) for i in range(len(other_row))])
            reference = (other_row[list(allowed)] / turn.temperature).log_softmax(-1)
            value = value - coefficient * (logp.exp() * (logp - reference)).sum()
        total = total - value
    return total


@pytest.mark.parametrize(
    "config",
    [
        LearnerConfig(),
        LearnerConfig(loss="clipped", clip_low=0.1, clip_high=0.3),
        LearnerConfig(entropy_bonus=0.1, kl_coefficient=0.3, tokens_per_pass=32),
        LearnerConfig(gradient_checkpointing=True, tokens_per_pass=40),
    ],
    ids=["policy_gradient", "clipped", "entropy_and_kl_in_small_passes", "checkpointed"],
)
def test_packed_gradient_of_three_policies_equals_plain_peft_one_sequence_at_a_time(
    tiny_base: BaseModel, config: LearnerConfig
) -> None:
    _equals_plain_peft(tiny_base, config)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_has_the_gradient_of_plain_peft(make_base: MakeBase, tmp_path: Path, family: str) -> None:
    base = make_base(model=str(tiny_random(tmp_path / family, seed=5, family=family)))  # type: ignore[arg-type]
    _equals_plain_peft(base, LearnerConfig())


@pytest.mark.parametrize("tokens_per_pass", [1024, 32])
def test_a_policy_is_pulled_to_its_own_magnet_and_to_itself_before_the_update(
    tiny_base: BaseModel, tokens_per_pass: int
) -> None:
    _noisy(tiny_base)
    config = LearnerConfig(passes=2, kl_coefficient=0.1, entropy_bonus=0.05, tokens_per_pass=tokens_per_pass)
    learner = Learner(tiny_base, MODELS, config, 1, Magnet(strength=0.4, proximal=0.7, every=0, rate=1.0))
    episodes, advantages = _episodes()
    batch = build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=learner.keep_zero)
    pulls: dict[str, list[Pull]] = {m.model_id: [(0.4, _peft(tiny_base, m))] for m in MODELS}
    _wander(tiny_base, 1)
    learner.backward(batch)
    _has_gradient_of_plain_peft(tiny_base, config, episodes, advantages, pulls)
    for m in MODELS:
        pulls[m.model_id].append((0.7, _peft(tiny_base, m)))
    _wander(tiny_base, 2)
    learner.backward(batch, first=False)
    _has_gradient_of_plain_peft(tiny_base, config, episodes, advantages, pulls)


def _wander(base: BaseModel, seed: int) -> None:
    """Move every policy, as a step would."""
    generator = torch.Generator().manual_seed(seed)
    for m in MODELS:
        adapter = base.bank.training(m.model_id)
        with torch.no_grad():
            adapter.flat.add_(0.05 * torch.randn(adapter.flat.shape, generator=generator))
        adapter.touch()


def _equals_plain_peft(tiny_base: BaseModel, config: LearnerConfig) -> None:
    _noisy(tiny_base)
    learner = Learner(tiny_base, MODELS, config, 1)
    episodes, advantages = _episodes()
    batch = build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=learner.keep_zero)
    learner.backward(batch)
    _has_gradient_of_plain_peft(tiny_base, config, episodes, advantages, {})


def _has_gradient_of_plain_peft(
    tiny_base: BaseModel,
    config: LearnerConfig,
    episodes: Sequence[Episode],
    advantages: Advantages,
    pulls: Mapping[str, Sequence[Pull]],
) -> None:
    for m in MODELS:
        adapter = tiny_base.bank.training(m.model_id)
        assert adapter.grad is not None
        assert float(adapter.grad.norm()) > 1e-3
        theirs = _plain_gradient(tiny_base, m, config, episodes, advantages, pulls.get(m.model_id, ()))
        torch.testing.assert_close(adapter.grad, theirs, rtol=2e-3, atol=2e-6)


def _plain_gradient(
    base: BaseModel,
    m: ModelConfig,
    config: LearnerConfig,
    episodes: Sequence[Episode],
    advantages: Advantages,
    pulls: Sequence[Pull] = (),
) -> torch.Tensor:
    """What plain PEFT finds for one policy in float32, laid out as an adapter is."""
    model = _peft(base, m)
    for e in episodes:
        (turn,) = e.trajectories[m.model_id].turns
        loss = _naive_loss(model, turn, advantages.of(e.episode_id, m.model_id, 0), config, pulls) / len(episodes)
        loss.backward()  # type: ignore[no-untyped-call]
    adapter = base.bank.training(m.model_id)
    found = torch.zeros_like(adapter.flat)
    for shape in adapter.shapes:
        layer = model.base_model.model.get_submodule(shape.name)
        shape.a(found, adapter.rank).copy_(layer.lora_A["default"].weight.grad)
        shape.b(found, adapter.rank).copy_(layer.lora_B["default"].weight.grad)
    return found


@pytest.mark.parametrize(
    "config",
    [
        LearnerConfig(),
        LearnerConfig(loss="clipped", entropy_bonus=0.1, kl_coefficient=0.3, tokens_per_pass=32),
        LearnerConfig(gradient_checkpointing=True, tokens_per_pass=40),
    ],
    ids=["policy_gradient", "clipped_with_entropy_and_kl_in_small_passes", "checkpointed"],
)
def test_in_bfloat16_every_policy_is_moved_as_plain_peft_would_move_it(
    make_base: MakeBase, config: LearnerConfig
) -> None:
    base = make_base(dtype="bfloat16")
    _noisy(base)
    episodes, advantages = _episodes()
    for m, ours in zip(MODELS, _gradient(base, config, episodes, advantages), strict=True):
        theirs = _plain_gradient(base, m, config, episodes, advantages)
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.998
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.05)


def _gradient(
    base: BaseModel, config: LearnerConfig, episodes: Sequence[Episode], advantages: Advantages
) -> list[torch.Tensor]:
    learner = Learner(base, MODELS, config, 1)
    learner.backward(build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=learner.keep_zero))
    grads = [base.bank.training(m.model_id).grad for m in MODELS]
    return [g.clone() for g in grads if g is not None]


def test_any_packing_gives_the_same_gradient(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    whole = _gradient(tiny_base, LearnerConfig(), episodes, advantages)
    for tokens_per_pass in (16, 40, 100):
        cut = _gradient(tiny_base, LearnerConfig(tokens_per_pass=tokens_per_pass), episodes[::-1], advantages)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_one_batch_of_eight_equals_eight_of_one(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    whole = _gradient(tiny_base, LearnerConfig(), episodes, advantages)
    parts = [_gradient(tiny_base, LearnerConfig(), [e], advantages) for e in episodes]
    for i, grad in enumerate(whole):
        torch.testing.assert_close(grad, sum(p[i] for p in parts) / len(episodes), rtol=1e-4, atol=1e-7)


def test_a_gradient_reaches_only_the_adapter_that_spoke(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    values = {
        e: {seat: (adv if seat == "middle" else (0.0,)) for seat, adv in seats.items()}
        for e, seats in advantages.values.items()
    }
    low, middle, high = _gradient(tiny_base, LearnerConfig(), episodes, Advantages(values))
    assert not low.any()
    assert not high.any()
    assert middle.any()


def test_zero_advantages_leave_every_weight_as_it_was(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    nothing = Advantages({e: dict.fromkeys(seats, (0.0,)) for e, seats in advantages.values.items()})
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 1)
    # momentum from a real step must not move the weights of a step that learned nothing
    ids = [m.model_id for m in MODELS]
    learner.step(build_batch(ids, episodes, advantages, keep_zero=False), 1)
    before = {i: tiny_base.bank.training(i).flat.clone() for i in ids}
    stats = learner.step(build_batch(ids, episodes, nothing, keep_zero=False), 1)
    for i in ids:
        assert torch.equal(before[i], tiny_base.bank.training(i).flat)
        assert not stats.policies[i].stepped
        assert math.isfinite(stats.policies[i].grad_norm)


@pytest.mark.parametrize("tier", [Tier.SIMULATED, Tier.SCRIPT, Tier.HUMAN])
def test_turns_no_engine_sampled_never_reach_the_learner(tier: Tier) -> None:
    episodes, advantages = _episodes()
    spoiled = [
        replace(
            e,
            trajectories={
                s: replace(t, turns=tuple(replace(turn, tier=tier) for turn in t.turns))
                for s, t in e.trajectories.items()
            },
        )
        for e in episodes
    ]
    batch = build_batch([m.model_id for m in MODELS], spoiled, advantages, keep_zero=True)
    assert batch.sequences == ()
    assert batch.turns == (0, 0, 0)


def test_equal_choices_of_many_episodes_cost_one(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    (e, *_), advantages = _episodes()
    many = [replace(e, episode_id=f"copy{n}") for n in range(50)]
    values = Advantages({m.episode_id: advantages.values[e.episode_id] for m in many})
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 1)
    ids = [m.model_id for m in MODELS]
    one, fifty = LearnerStats(), LearnerStats()
    for stats, batch_episodes, adv in ((one, [e], advantages), (fifty, many, values)):
        batch = build_batch(ids, batch_episodes, adv, keep_zero=False)
        found = learner.step(batch, 1)
        stats.packed_tokens = found.packed_tokens
    assert fifty.packed_tokens == one.packed_tokens > 0


def test_clipping_is_per_policy(make_base: MakeBase) -> None:
    base = make_base()
    _noisy(base)
    episodes, advantages = _episodes()
    learner = Learner(base, MODELS, LearnerConfig(max_grad_norm=1e-3), 1)
    stats = learner.step(build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=False), 1)
    for m in MODELS:
        grad = base.bank.training(m.model_id).grad
        assert grad is not None
        assert float(grad.norm()) == pytest.approx(1e-3, rel=1e-4)
        assert stats.policies[m.model_id].grad_norm > 1e-3


def test_learning_rates_are_each_policys_own_and_follow_the_schedule(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    learner = Learner(tiny_base, MODELS, LearnerConfig(warmup_updates=2, final_learning_rate=0.5), 6)
    assert [round(learner.schedule(n), 3) for n in range(1, 7)] == [0.333, 0.667, 1.0, 0.833, 0.667, 0.5]
    episodes, advantages = _episodes()
    stats = learner.step(build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=False), 3)
    assert {i: s.learning_rate for i, s in stats.policies.items()} == {"low": 1e-3, "middle": 2e-3, "high": 5e-4}


def test_state_brings_back_weights_and_moments_bit_by_bit(make_base: MakeBase, tmp_path: Path) -> None:
    episodes, advantages = _episodes()
    ids = [m.model_id for m in MODELS]
    batch = build_batch(ids, episodes, advantages, keep_zero=False)
    one, two = make_base(), make_base()
    _noisy(one)
    _noisy(two)
    straight = Learner(one, MODELS, LearnerConfig(), 3)
    straight.step(batch, 1)
    state = straight.state()
    straight.step(batch, 2)
    resumed = Learner(two, MODELS, LearnerConfig(), 3)
    resumed.restore(state)
    resumed.step(batch, 2)
    for i in ids:
        assert torch.equal(one.bank.training(i).flat, two.bank.training(i).flat)


# -- magnets ------------------------------------------------------------------------------------------------------


def _magnet(learner: Learner, model_id: str) -> torch.Tensor:
    return learner.anchors.state()[f"{model_id}/magnet"]


def test_a_magnet_follows_when_it_is_its_turn(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 4, Magnet(strength=0.1, proximal=0.0, every=2, rate=0.25))
    episodes, advantages = _episodes()
    batch = build_batch([m.model_id for m in MODELS], episodes, advantages, keep_zero=learner.keep_zero)
    start = {m.model_id: tiny_base.bank.training(m.model_id).flat.clone() for m in MODELS}
    learner.step(batch, 1)
    assert all(torch.equal(_magnet(learner, i), start[i]) for i in start)
    stats = learner.step(batch, 2)
    for i, began in start.items():
        now = tiny_base.bank.training(i).flat
        assert not torch.equal(now, began)
        torch.testing.assert_close(_magnet(learner, i), 0.75 * began + 0.25 * now)
        assert stats.policies[i].magnet_kl > 0
    learner.step(batch, 3)
    assert stats.policies["low"].kl == 0


def test_a_falling_magnet_pulls_with_the_weight_of_its_update(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    nothing = Advantages({e: dict.fromkeys(seats, (0.0,)) for e, seats in advantages.values.items()})
    batch = build_batch([m.model_id for m in MODELS], episodes, nothing, keep_zero=True)
    norms = []
    for magnet, update in [
        (Magnet(strength=0.4, proximal=0.0, every=0, rate=1.0, final=0.1), 1),
        (Magnet(strength=0.4, proximal=0.0, every=0, rate=1.0, final=0.1), 5),
        (Magnet(strength=0.4, proximal=0.0, every=0, rate=1.0), 5),
    ]:
        learner = Learner(tiny_base, MODELS, LearnerConfig(), 5, magnet)
        for kept in learner.anchors._magnets.values():  # away from the policies, so that it pulls
            kept.flat.mul_(0.5)
            kept.touch()
        weights = {m.model_id: tiny_base.bank.training(m.model_id).flat.clone() for m in MODELS}
        norms.append(learner.step(batch, update).policies["low"].grad_norm)
        with torch.no_grad():
            for model_id, flat in weights.items():
                tiny_base.bank.training(model_id).flat.copy_(flat)
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-4)


def test_a_magnet_that_becomes_the_policy_is_the_policy_bit_by_bit(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 4, Magnet(strength=0.1, proximal=0.0, every=1, rate=1.0))
    episodes, advantages = _episodes()
    ids = [m.model_id for m in MODELS]
    learner.step(build_batch(ids, episodes, advantages, keep_zero=True), 1)
    for i in ids:
        assert torch.equal(_magnet(learner, i), tiny_base.bank.training(i).flat)
    nothing = Advantages({e: dict.fromkeys(seats, (0.0,)) for e, seats in advantages.values.items()})
    stats = learner.step(build_batch(ids, episodes, nothing, keep_zero=learner.keep_zero), 2)
    assert all(s.magnet_kl == pytest.approx(0.0, abs=1e-6) for s in stats.policies.values())


def _passes_without_gradient(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each from now on."""
    passes: list[int] = []
    whole = base.hidden

    def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(ids))
        return whole(ids, *rest)

    monkeypatch.setattr(base, "hidden", counted)
    return passes


def test_anchors_are_computed_once_for_all_passes_and_never_when_off(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _noisy(tiny_base)
    passes = _passes_without_gradient(tiny_base, monkeypatch)
    episodes, advantages = _episodes()
    ids = [m.model_id for m in MODELS]
    batch = build_batch(ids, episodes, advantages, keep_zero=True)
    Learner(tiny_base, MODELS, LearnerConfig(passes=3), 1).step(batch, 1)
    assert passes == []
    magnet = Magnet(strength=0.1, proximal=0.1, every=1, rate=1.0)
    learner = Learner(tiny_base, MODELS, LearnerConfig(passes=3, kl_coefficient=0.1), 1, magnet)
    packed = learner.step(batch, 1).packed_tokens
    assert passes == [packed // 3] * 2
    learner.step(batch, 2)
    assert passes == [packed // 3] * 4, "nothing of the update before is used again"


def _choices_only() -> tuple[list[Episode], Advantages]:
    episodes, advantages = _episodes()
    kept = [e for e in episodes if all(t.turns[0].allowed is not None for t in e.trajectories.values())]
    assert 0 < len(kept) < len(episodes)
    return kept, advantages


def test_what_an_anchor_makes_of_choices_is_computed_once_until_it_moves(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _noisy(tiny_base)
    passes = _passes_without_gradient(tiny_base, monkeypatch)
    episodes, advantages = _choices_only()
    ids = [m.model_id for m in MODELS]
    first = build_batch(ids, episodes[:3], advantages, keep_zero=True)
    all_of_them = build_batch(ids, episodes, advantages, keep_zero=True)
    stays = Magnet(strength=0.1, proximal=0.0, every=0, rate=1.0)
    learner = Learner(tiny_base, MODELS, LearnerConfig(kl_coefficient=0.1), 9, stays)
    packed = learner.step(first, 1).packed_tokens
    assert passes == [packed] * 2
    learner.step(first, 2)
    assert len(passes) == 2
    more = learner.step(all_of_them, 3).packed_tokens
    assert len(passes) == 4
    assert 0 < passes[2] == passes[3] < more, "what was there is not computed again"
    learner.step(all_of_them, 4)
    assert len(passes) == 4
    resumed = Learner(tiny_base, MODELS, LearnerConfig(kl_coefficient=0.1), 9, stays)
    resumed.restore(learner.state())
    resumed.step(all_of_them, 5)
    assert len(passes) == 4, "a run that goes on from a checkpoint knows the same"
    for there, here in ((learner.anchors._of_base, resumed.anchors._of_base),
                        (learner.anchors._of_magnets, resumed.anchors._of_magnets)):  # fmt: skip
        assert there._rows.keys() == here._rows.keys()
        assert all(torch.equal(row, here._rows[site]) for site, row in there._rows.items())
    learner.anchors._of_base._most_bytes = 0
    learner.step(all_of_them, 6)
    assert passes[4:] == [more], "more than may be kept"

    passes.clear()
    moves = Magnet(strength=0.1, proximal=0.0, every=2, rate=0.5)
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 9, moves)
    for update in (1, 2, 3, 4):
        learner.step(first, update)
    assert passes == [packed] * 2, "before the first move, and after it"
    assert not learner.anchors._of_magnets._rows, "which stand in no checkpoint once they have moved again"


def test_what_is_remembered_pulls_as_what_is_computed_anew(make_base: MakeBase) -> None:
    episodes, advantages = _choices_only()
    ids = [m.model_id for m in MODELS]
    batches = [build_batch(ids, some, advantages, keep_zero=True) for some in (episodes[:3], episodes, episodes[1:])]
    magnet = Magnet(strength=0.3, proximal=0.0, every=0, rate=1.0)
    bases = make_base(), make_base()
    for base in bases:
        _noisy(base)
    remembering, anew = (Learner(base, MODELS, LearnerConfig(kl_coefficient=0.2), 3, magnet) for base in bases)
    for learner in (remembering, anew):
        for kept in learner.anchors._magnets.values():  # away from the policies, so that it pulls
            kept.flat.mul_(0.5)
            kept.touch()
    for batch in batches:
        anew.anchors._of_base.forget()
        anew.anchors._of_magnets.forget()
        for learner in (remembering, anew):
            learner.backward(batch)
        for i in ids:
            gradients = [base.bank.training(i).grad for base in bases]
            torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_magnets_come_back_bit_by_bit_and_are_missed(make_base: MakeBase) -> None:
    episodes, advantages = _episodes()
    ids = [m.model_id for m in MODELS]
    batch = build_batch(ids, episodes, advantages, keep_zero=True)
    magnet = Magnet(strength=0.3, proximal=0.2, every=1, rate=0.5)
    config = LearnerConfig(passes=2)
    one, two = make_base(), make_base()
    _noisy(one)
    _noisy(two)
    straight = Learner(one, MODELS, config, 3, magnet)
    straight.step(batch, 1)
    state = straight.state()
    straight.step(batch, 2)
    resumed = Learner(two, MODELS, config, 3, magnet)
    resumed.restore(state)
    resumed.step(batch, 2)
    for i in ids:
        assert torch.equal(one.bank.training(i).flat, two.bank.training(i).flat)
        assert torch.equal(_magnet(straight, i), _magnet(resumed, i))
    without = {name: tensor for name, tensor in state.items() if name != "middle/magnet"}
    with pytest.raises(RunFolderError, match="no magnet of model 'middle'"):
        resumed.restore(without)


def test_a_model_that_leaves_takes_its_magnet_along(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    learner = Learner(tiny_base, MODELS, LearnerConfig(), 1, Magnet(strength=0.3, proximal=0.0, every=1, rate=1.0))
    learner.remove("middle")
    assert set(learner.anchors.state()) == {"low/magnet", "high/magnet"}


def test_checkpointed_layers_keep_less_and_run_once_more(tiny_base: BaseModel) -> None:
    _noisy(tiny_base)
    episodes, advantages = _episodes()
    runs: list[int] = []
    layer = tiny_base.model.get_decoder().layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    kept: list[int] = []
    counts = []
    for checkpointing in (False, True):
        runs.clear()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            _gradient(tiny_base, LearnerConfig(gradient_checkpointing=checkpointing), episodes, advantages)
        counts.append((len(runs), sum(kept)))
    (plain_runs, plain_kept), (checked_runs, checked_kept) = counts
    assert checked_runs == 2 * plain_runs
    assert checked_kept < plain_kept / 2
