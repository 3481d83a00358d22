"""What must not matter: how sequences are packed for the learner, and in whose company an episode is played.

It holds to rounding, so bases are in float32: bfloat16 rounds so coarsely that it may sample another token. Examples
are the same in every run (`derandomize`): a sampled token hangs on a comparison of floats, and one that lies on the
edge would otherwise turn up one day in ten thousand.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.config import BaseConfig, LearnerConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.inference.local.engine import LocalEngine
from coterie.lm.base import BaseModel, load_base
from coterie.models import ModelConfig
from coterie.rollout.runner import Plan, Runner, with_services
from coterie.training.batch import build_batch
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, Advantages, Episode, GenerateRequest, Generation, Split, Turn
from tests.support.episodes import episode, make_turn

MODELS = tuple(
    ModelConfig(model_id=name, lora_rank=rank, lora_alpha=2.0 * rank) for name, rank in (("a", 2), ("b", 4), ("c", 4))
)
NAMES = tuple(m.model_id for m in MODELS)
FEW = settings(max_examples=20, derandomize=True)


def _stir(base: BaseModel) -> None:
    """Adapters away from the base, so that every one of them answers and learns in its own way."""
    for number, name in enumerate(NAMES):
        flat = base.bank.training(name).flat
        with torch.no_grad():
            flat.add_(0.05 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(number)))


@pytest.fixture(scope="module")
def base(tiny_path: Path) -> BaseModel:
    made = load_base(BaseConfig(model=str(tiny_path), threads=1, dtype="float32"))
    for number, m in enumerate(MODELS):
        made.bank.add(m.model_id, m.lora_rank, m.lora_alpha, number)
    _stir(made)
    return made


# -- packing ------------------------------------------------------------------------------------------------------

# few distinct tokens, so that prefixes are shared in every way there is
_ids = st.integers(10, 12)
_advantage = st.floats(-2, 2, width=32).filter(lambda a: a == 0 or abs(a) > 1e-3)


@st.composite
def _turns(draw: st.DrawFn) -> tuple[Turn, float]:
    name = draw(st.sampled_from(NAMES))
    prompt = tuple(draw(st.lists(_ids, min_size=1, max_size=12)))
    allowed = draw(st.sampled_from((None, ((10, 11), (12,), (10, 11, 12)))))
    if allowed is None:
        tokens = tuple(draw(st.lists(_ids, min_size=1, max_size=4)))
    else:
        tokens = tuple(draw(st.sampled_from(among)) for among in allowed)
    turn = make_turn(
        "seat", model_id=name, prompt_ids=prompt, token_ids=tokens, allowed=allowed,
        logprobs=tuple(draw(st.sampled_from((-0.3, -1.1))) for _ in tokens),
        temperature=draw(st.sampled_from((1.0, 0.7))), bias=draw(st.sampled_from((None, {10: 0.4, 12: -0.2}))),
    )  # fmt: skip
    return turn, draw(_advantage)


def _played(turns: Sequence[tuple[Turn, float]]) -> tuple[list[Episode], Advantages]:
    episodes = [
        episode(str(n), scores={"seat": 0.5}, turns={"seat": [turn]}, models={"seat": turn.model_id})
        for n, (turn, _) in enumerate(turns)
    ]
    return episodes, Advantages({str(n): {"seat": (advantage,)} for n, (_, advantage) in enumerate(turns)})


def _gradients(
    base: BaseModel, config: LearnerConfig, episodes: Sequence[Episode], advantages: Advantages, shuffled: int | None
) -> list[torch.Tensor]:
    learner = Learner(base, MODELS, config, 1)
    order = [*episodes]
    if shuffled is not None:
        random.Random(shuffled).shuffle(order)
    learner.backward(build_batch(NAMES, order, advantages, keep_zero=learner.keep_zero))
    found = []
    for name in NAMES:
        grad = base.bank.training(name).grad
        assert grad is not None
        found.append(grad.clone())
    return found


@FEW
@given(
    st.lists(_turns(), min_size=1, max_size=16),
    st.integers(16, 90),
    st.integers(0, 2**16),
    st.booleans(),
    st.sampled_from(({}, {"loss": "clipped", "clip_low": 0.1}, {"entropy_bonus": 0.1, "kl_coefficient": 0.2})),
)
def test_any_packing_of_the_same_data_gives_the_same_gradient(
    base: BaseModel,
    turns: list[tuple[Turn, float]],
    tokens_per_pass: int,
    shuffled: int,
    checkpointing: bool,
    loss: dict[str, object],
) -> None:
    episodes, advantages = _played(turns)
    whole = _gradients(base, LearnerConfig.model_validate(loss), episodes, advantages, None)
    cut = LearnerConfig.model_validate(
        {**loss, "tokens_per_pass": tokens_per_pass, "gradient_checkpointing": checkpointing}
    )
    for one, other in zip(whole, _gradients(base, cut, episodes, advantages, shuffled), strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-6


@FEW
@given(st.lists(_turns(), min_size=2, max_size=12), st.data())
def test_the_gradient_of_a_batch_is_the_sum_over_any_partition_of_it(
    base: BaseModel, turns: list[tuple[Turn, float]], data: st.DataObject
) -> None:
    episodes, advantages = _played(turns)
    part = data.draw(st.lists(st.integers(0, 2), min_size=len(turns), max_size=len(turns)))

    def total(chosen: Sequence[Episode]) -> list[torch.Tensor]:
        # the loss is a mean over a policy's turns; times their number it is a sum
        spoken = [sum(e.trajectories["seat"].model_id == name for e in chosen) for name in NAMES]
        found = _gradients(base, LearnerConfig(), chosen, advantages, None)
        return [grad * count for grad, count in zip(found, spoken, strict=True)]

    groups = [total([e for e, at in zip(episodes, part, strict=True) if at == number]) for number in range(3)]
    for number, one in enumerate(total(episodes)):
        other = sum(group[number] for group in groups)
        assert float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-5


# -- company ------------------------------------------------------------------------------------------------------

CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15))


@st.composite
def _requests(draw: st.DrawFn) -> GenerateRequest:
    name = draw(st.sampled_from((None, *NAMES)))
    return GenerateRequest(
        prompt_ids=tuple(draw(st.lists(_ids, min_size=1, max_size=24))),
        adapter=None if name is None else AdapterVersion(name, 0),
        seed=draw(st.integers(0, 2**20)),
        max_tokens=draw(st.integers(1, 6)),
        temperature=draw(st.sampled_from((1.0, 0.7, 1.5))),
        choices=draw(st.sampled_from((None, CHOICES))),
        bias=draw(st.sampled_from((None, {10: 0.5, 11: -0.5}))),
    )


async def _after(engine: LocalEngine, request: GenerateRequest, turns: int) -> Generation:
    """Ask after so many turns of the event loop: at once, or while others decode."""
    for _ in range(turns):
        await asyncio.sleep(0)
    return await engine.generate(request)


@settings(max_examples=12, derandomize=True)
@given(
    st.lists(st.tuples(_requests(), st.integers(0, 40)), min_size=2, max_size=10),
    st.randoms(use_true_random=False),
    st.sampled_from((64, 160, 4096)),
    st.sampled_from((16, 48, 1024)),
)
def test_what_a_request_samples_does_not_depend_on_its_company(
    base: BaseModel,
    asked: list[tuple[GenerateRequest, int]],
    rng: random.Random,
    cache_tokens: int,
    tokens_per_pass: int,
) -> None:
    by_itself = LocalEngine(base, cache_tokens=64)
    alone = []
    for request, _ in asked:
        by_itself.cache.clear()
        alone.append(asyncio.run(by_itself.generate(request)))
    engine = LocalEngine(base, cache_tokens=cache_tokens, tokens_per_pass=tokens_per_pass)
    order = rng.sample(range(len(asked)), len(asked))

    async def together() -> list[Generation]:
        return list(await asyncio.gather(*(_after(engine, *asked[i]) for i in order)))

    for i, made in zip(order, asyncio.run(together()), strict=True):
        assert (made.token_ids, made.choice, made.allowed) == (alone[i].token_ids, alone[i].choice, alone[i].allowed)
        assert made.logprobs == pytest.approx(alone[i].logprobs, abs=1e-4)


@dataclass(frozen=True, repr=False)
class Stage:
    """A run whose episodes can be played again. Written out it would be so long that hypothesis, telling of an example
    that fails, warns of that instead."""

    runner: Runner
    base: BaseModel
    plans: Sequence[Plan]
    alone: Sequence[Episode]
    """Each plan's episode, played by itself."""

    def play(self, chosen: Sequence[int], engine: LocalEngine) -> list[Episode]:
        episodes, failed = asyncio.run(with_services(self.runner, engine=engine).play([self.plans[i] for i in chosen]))
        assert failed == []
        return episodes


@pytest.fixture(scope="module")
def stage(tiny_path: Path) -> Stage:
    """Leader and followers on all types of task: advice is heard, so what one samples is part of others' prompts."""
    config = parse_config(
        {
            "mode": "cooperative",
            "preset": "cooperative_team",
            "scenario": {"id": "tasks"},
            "base": {"model": str(tiny_path), "threads": 1, "dtype": "float32"},
        }
    )
    environment = MultiModelEnvironment(config=config)
    loop = environment.build()
    for number, model in enumerate(loop.models):
        flat = environment.base.bank.training(model.model_id).flat
        with torch.no_grad():
            flat.add_(0.1 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(number)))
    tasks = loop.tasks.take(5)
    plans = [
        Plan(task, loop.runner.seating(task, loop.models, n, rotate=False), f"1.{n}.{k}", f"1.{n}", 1, 0.3)
        for n, task in enumerate(tasks)
        for k in range(3)
    ]
    made = Stage(loop.runner, environment.base, plans, ())
    alone = [made.play([i], LocalEngine(environment.base))[0] for i in range(len(plans))]
    return Stage(loop.runner, environment.base, plans, alone)


def _said(played: Episode) -> list[tuple[object, ...]]:
    return [
        (seat, turn.kind, turn.prompt_ids, turn.token_ids, turn.choice)
        for seat, trajectory in played.trajectories.items()
        for turn in trajectory.turns
    ]


@settings(max_examples=12, derandomize=True)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=15, unique=True), st.sampled_from((1024, 4096)))
def test_an_episode_samples_the_same_whoever_is_played_beside_it(
    stage: Stage, chosen: list[int], cache_tokens: int
) -> None:
    for i, played in zip(chosen, stage.play(chosen, LocalEngine(stage.base, cache_tokens=cache_tokens)), strict=True):
        assert played.withheld == stage.alone[i].withheld
        assert _said(played) == _said(stage.alone[i])
        assert played.rewards == stage.alone[i].rewards


def test_the_episodes_of_the_stage_differ(stage: Stage) -> None:
    """Or their being equal would say nothing."""
    assert stage.plans[0].task.split is Split.TRAIN
    assert len({str(_said(played)) for played in stage.alone}) > len(stage.alone) / 2
    assert any(played.withheld for played in stage.alone)
    assert all(len(played.trajectories) == 3 for played in stage.alone)
