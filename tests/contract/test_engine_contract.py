"""What every engine keeps (`coterie.inference.base.Engine`), whatever generates behind it.

To hold another engine to it: write a context manager from the tiny base's directory (and one to write in) to a
`Subject`, and add it to `ENGINES`. Where no model answers, what only a model can keep is not asked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from coterie.config import BaseConfig
from coterie.errors import EngineError, RequestError
from coterie.inference.base import Engine
from coterie.inference.fake import ByteTokenizer, FakeServer, write_adapter
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.local.engine import LocalEngine
from coterie.inference.loop_thread import LoopThread
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher
from coterie.inference.remote import RemoteEngine
from coterie.inference.simulated import SimulatedEngine
from coterie.inference.tiers import TieredEngine
from coterie.inference.wire import ServerSpec, server_spec
from coterie.lm.adapters import save_adapter
from coterie.lm.base import load_base
from coterie.serve.app import build_app
from coterie.serve.local import LocalTokenEngine
from coterie.serve.run import listening
from coterie.serve.settings import ServeSettings
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier

T = TypeVar("T")

TRAINED, UNTRAINED = AdapterVersion("trained", 3), AdapterVersion("untrained", 0)
"""The versions a subject has published: one with weights that matter, and one that equals the base."""
VOCABULARY = 300
"""Token ids below this are ordinary text of the tiny base (its first three ids are special)."""


@dataclass(frozen=True)
class Subject:
    """An engine over some base with `TRAINED` and `UNTRAINED` published."""

    engine: Engine
    stop_ids: tuple[int, ...]
    publish_other: Callable[[AdapterVersion], Coroutine[Any, Any, None]]
    """Publish this version of model "trained", with other weights than before."""
    vocabulary: int = VOCABULARY + 100
    model: bool = True
    """Whether a model answers, so that adapters, temperatures and biases change what it says."""


class Weights:
    """The tiny base with the adapters a subject publishes; `change` moves those of model "trained"."""

    def __init__(self, tiny: Path) -> None:
        self.base = load_base(BaseConfig(model=str(tiny), threads=1, dtype="float32"))
        for version, rank in ((TRAINED, 4), (UNTRAINED, 7)):
            self.base.bank.add(version.model_id, rank, 2.0 * rank, seed=rank)
            self.base.bank.publish(version)
        flat = self.base.bank.training(TRAINED.model_id).flat
        self._flat, self._noise = flat, 0.15 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
        self.change(1.0)

    def change(self, factor: float) -> None:
        with torch.no_grad():
            self._flat.add_(factor * self._noise)

    def write(self, version: AdapterVersion, directory: Path) -> Path:
        save_adapter(self.base.bank.training(version.model_id), directory, self.base, version)
        return directory


@contextmanager
def local(tiny: Path, aside: Path) -> Iterator[Subject]:
    weights = Weights(tiny)
    engine = LocalEngine(weights.base, cache_tokens=1024, tokens_per_pass=128)

    async def publish_other(version: AdapterVersion) -> None:
        weights.change(0.7)
        await engine.publish(version, None)

    yield Subject(engine, weights.base.chat.stop_ids, publish_other, weights.base.vocabulary)


class WideTokenizer(ByteTokenizer):
    """The fake's, with more ids than the contract asks about."""

    vocabulary = VOCABULARY + 100

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i for i in ids if i < 259])


@contextmanager
def over(
    specs: Sequence[ServerSpec], stop_ids: tuple[int, ...], write: Callable[[AdapterVersion, bool], Path], **fields: Any
) -> Iterator[Subject]:
    """An engine over servers that run elsewhere. `write` writes a version's adapter, the second time another one."""
    tiers = fields.pop("tiers", False)
    control, transport = HttpControl(), HttpTransport()
    pool = ServerPool(specs, control, policy="round_robin")
    publisher = Publisher(pool, control, transport, quorum=1.0, canary_tolerance=0.01)
    bare = RemoteEngine(transport, Fleet(pool, control, publisher, closing=(control.close,)), **fields)
    ladder = TieredEngine([bare, SimulatedEngine()])
    engine: Engine = ladder if tiers else bare

    async def publish_other(version: AdapterVersion) -> None:
        await engine.publish(version, write(version, True))

    async def prepare() -> None:
        for version in (UNTRAINED, TRAINED):
            await engine.publish(version, write(version, False))

    async def finish() -> None:
        await engine.close()

    RESTING.append(ladder.rest)
    try:
        run(prepare())
        yield Subject(engine, stop_ids, publish_other)
        run(finish())
    finally:
        RESTING.clear()


@contextmanager
def elsewhere(*servers: AbstractAsyncContextManager[T]) -> Iterator[list[T]]:
    """Servers in an event loop of their own, as in a process: that of the engine ends and begins anew."""
    thread = LoopThread("servers")
    try:
        yield [thread.run(server.__aenter__()) for server in servers]
        for server in servers:
            thread.run(server.__aexit__(None, None, None))
    finally:
        thread.close()


@contextmanager
def remote(tiny: Path, aside: Path, servers: int = 1, **fields: Any) -> Iterator[Subject]:
    """Fake servers."""

    def write(version: AdapterVersion, other: bool) -> Path:
        seed = 10 * version.version + other
        return write_adapter(aside / version.name, seed=seed, zero=version == UNTRAINED)

    with elsewhere(*(FakeServer(seed=3, tokenizer=WideTokenizer()) for _ in range(servers))) as fakes:
        specs = [fake.spec for fake in fakes]
        with over(specs, WideTokenizer.stop_ids, write, **fields) as subject:
            yield subject


@contextmanager
def served(tiny: Path, aside: Path) -> Iterator[Subject]:
    """`coterie serve`: the engine inside another process, with the weights of `local`."""
    weights = Weights(tiny)
    engine = LocalEngine(Weights(tiny).base, cache_tokens=1024, tokens_per_pass=128)

    def write(version: AdapterVersion, other: bool) -> Path:
        if other:
            weights.change(0.7)
        return weights.write(version, aside / version.name)

    @asynccontextmanager
    async def server() -> AsyncIterator[ServerSpec]:
        app = build_app(LocalTokenEngine(engine), ServeSettings(model="tiny", adapter_dirs=(aside,)))
        async with listening(app, "127.0.0.1", 0) as (_, port):
            yield server_spec(f"http://127.0.0.1:{port}")

    with elsewhere(server()) as specs, over(specs, weights.base.chat.stop_ids, write) as subject:
        yield replace(subject, vocabulary=weights.base.vocabulary)


@contextmanager
def two_servers(tiny: Path, aside: Path) -> Iterator[Subject]:
    with remote(tiny, aside, servers=2) as subject:
        yield subject


@contextmanager
def drawn_by_servers(tiny: Path, aside: Path) -> Iterator[Subject]:
    """Servers that tell two log-probabilities at a step: larger sets are drawn there and measured in parts."""
    with remote(tiny, aside, max_top=2, remembered=0) as subject:
        yield subject


@contextmanager
def tiered(tiny: Path, aside: Path) -> Iterator[Subject]:
    with remote(tiny, aside, tiers=True) as subject:
        yield subject


@contextmanager
def simulated(tiny: Path, aside: Path) -> Iterator[Subject]:
    engine = SimulatedEngine()

    async def publish_other(version: AdapterVersion) -> None:
        await engine.publish(version, None)

    yield Subject(engine, (2,), publish_other, model=False)


ENGINES = [
    pytest.param(local, id="local"),
    pytest.param(remote, id="remote"),
    pytest.param(two_servers, id="two-servers"),
    pytest.param(drawn_by_servers, id="drawn-by-servers"),
    pytest.param(tiered, id="tiered"),
    pytest.param(served, id="served"),
]


@pytest.fixture(params=[*ENGINES, pytest.param(simulated, id="simulated")])
def subject(request: pytest.FixtureRequest, tiny_path: Path, tmp_path: Path) -> Iterator[Subject]:
    with request.param(tiny_path, tmp_path) as made:
        yield made


@pytest.fixture(params=ENGINES)
def model(request: pytest.FixtureRequest, tiny_path: Path, tmp_path: Path) -> Iterator[Subject]:
    """A subject behind which a model answers."""
    with request.param(tiny_path, tmp_path) as made:
        yield made


RESTING: list[Callable[[], Coroutine[Any, Any, None]]] = []
"""Let go of what belongs to an event loop, at its end."""


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        try:
            return await asyncio.wait_for(work, 60)
        finally:
            for rest in RESTING:
                await rest()

    return asyncio.run(bounded())


def ask(subject: Subject, *requests: GenerateRequest) -> list[Generation]:
    async def go() -> list[Generation]:
        return list(await asyncio.gather(*(subject.engine.generate(r) for r in requests)))

    found: list[Generation] = run(go())
    return found


def prompt(number: int, length: int = 12) -> tuple[int, ...]:
    return tuple(3 + (17 * number + 29 * i) % (VOCABULARY - 3) for i in range(length))


CHOICES = ((10,), (11, 12), (11, 13, 14), (11, 13, 15), (16, 17))


def request_(number: int = 0, adapter: AdapterVersion | None = TRAINED, **fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": prompt(number), "adapter": adapter, "seed": number, **fields})


def distribution(subject: Subject, request: GenerateRequest) -> tuple[float, ...]:
    (made,) = ask(subject, replace(request, distribution=True))
    assert made.choice_probs is not None
    return made.choice_probs


def test_a_generation_is_about_its_request(subject: Subject) -> None:
    for request in (request_(max_tokens=5), request_(1, None, choices=CHOICES), request_(2, UNTRAINED, max_tokens=1)):
        (made,) = ask(subject, request)
        assert made.prompt_ids == request.prompt_ids
        assert made.adapter == request.adapter
        assert made.tier is subject.engine.tier
        assert (made.tier in (Tier.LOCAL, Tier.HTTP, Tier.CAMEL)) == subject.model
        assert made.latency_s >= 0
        assert len(made.token_ids) >= 1
        assert len(made.logprobs) == len(made.token_ids) == len(made.entropy)
        assert all(math.isfinite(p) and p <= 1e-6 for p in made.logprobs)
        assert all(h >= -1e-6 for h in made.entropy)


def test_free_text_stops_at_a_stop_token_or_at_its_limit(subject: Subject) -> None:
    for number in range(8):
        (made,) = ask(subject, request_(number, max_tokens=6, stop_ids=subject.stop_ids))
        assert made.allowed is None
        assert made.choice is None
        ended = made.token_ids[-1] in subject.stop_ids
        assert made.finish_reason == ("stop" if ended else "length")
        assert ended or len(made.token_ids) == 6
        assert not set(made.token_ids[:-1]) & set(subject.stop_ids)
    anything = tuple(range(subject.vocabulary))
    (made,) = ask(subject, request_(max_tokens=6, stop_ids=anything))
    assert (len(made.token_ids), made.finish_reason) == (1, "stop")


def test_a_choice_is_one_of_the_choices_and_records_what_was_allowed(subject: Subject) -> None:
    for made in ask(subject, *(request_(n, choices=CHOICES) for n in range(40))):
        assert made.finish_reason == "choice"
        assert made.choice is not None
        assert made.token_ids == CHOICES[made.choice]
        assert made.allowed is not None
        for i, (token, allowed) in enumerate(zip(made.token_ids, made.allowed, strict=True)):
            begun = [c for c in CHOICES if c[:i] == made.token_ids[:i]]
            assert set(allowed) == {c[i] for c in begun}
            assert token in allowed
            if len(allowed) == 1:
                assert made.logprobs[i] == 0.0


def test_the_distribution_is_what_is_sampled_from(subject: Subject) -> None:
    request = request_(3, choices=CHOICES, bias={11: 0.8, 15: -0.5}, temperature=1.4)
    probs = distribution(subject, request)
    assert sum(probs) == pytest.approx(1, abs=1e-4)
    draws = ask(subject, *(replace(request, seed=seed) for seed in range(1500)))
    for choice, p in enumerate(probs):
        mine = [d for d in draws if d.choice == choice]
        assert len(mine) / len(draws) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(draws)) + 1e-3)
        assert all(math.exp(sum(d.logprobs)) == pytest.approx(p, rel=0.01) for d in mine[:3])
    (asked,) = ask(subject, replace(request, distribution=True))
    assert asked.token_ids == ()  # nothing was sampled


def test_a_seed_decides_whatever_else_is_asked_at_the_same_time(subject: Subject) -> None:
    requests = [request_(n % 4, (TRAINED, None, UNTRAINED)[n % 3], seed=n, max_tokens=5) for n in range(12)]
    requests += [request_(n % 4, TRAINED, seed=n, choices=CHOICES) for n in range(12)]
    together = ask(subject, *requests)
    alone = [ask(subject, request)[0] for request in reversed(requests)]
    assert [made.token_ids for made in together] == [made.token_ids for made in reversed(alone)]
    assert len({made.token_ids for made in ask(subject, *(request_(seed=s, max_tokens=5) for s in range(12)))}) > 6


def test_temperature_zero_takes_the_likeliest_and_reports_it_at_temperature_one(model: Subject) -> None:
    request = request_(5, choices=CHOICES[:1] + CHOICES[4:], temperature=0.0)
    warm = distribution(model, replace(request, temperature=1.0))
    for seed in range(5):
        (made,) = ask(model, replace(request, seed=seed))
        assert made.choice == max(range(2), key=warm.__getitem__)
        assert math.exp(sum(made.logprobs)) == pytest.approx(max(warm), rel=1e-3)
    texts = ask(model, *(request_(6, seed=seed, max_tokens=4, temperature=0.0) for seed in range(5)))
    assert len({made.token_ids for made in texts}) == 1


def test_temperature_flattens(model: Subject) -> None:
    spread = [
        max(distribution(model, request_(7, choices=CHOICES[:1] + CHOICES[4:], temperature=t))) for t in (0.3, 1.0, 2.0)
    ]
    assert spread[0] > spread[1] > spread[2] > 0.5


def test_a_bias_is_added_to_the_logits(model: Subject) -> None:
    choices = ((10,), (20,))
    plain = distribution(model, request_(8, choices=choices))
    moved = distribution(model, request_(8, choices=choices, bias={10: 1.5}))
    odds = [math.log(p[0] / p[1]) for p in (plain, moved)]
    assert odds[1] - odds[0] == pytest.approx(1.5, abs=0.01)
    (forced,) = ask(model, request_(8, max_tokens=3, bias={77: 100.0}))
    assert forced.token_ids == (77, 77, 77)
    (forbidden,) = ask(model, request_(8, choices=choices, bias={10: -100.0}))
    assert forbidden.choice == 1


def test_an_untrained_adapter_equals_the_base_and_a_trained_one_does_not(model: Subject) -> None:
    bare, untrained, trained = (
        distribution(model, request_(9, adapter, choices=CHOICES)) for adapter in (None, UNTRAINED, TRAINED)
    )
    assert untrained == pytest.approx(bare, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(trained, bare, strict=True)) > 0.01


def test_a_new_version_is_served_as_soon_as_it_is_published(model: Subject) -> None:
    request = request_(10, choices=CHOICES)
    before = distribution(model, request)
    new = replace(TRAINED, version=TRAINED.version + 1)
    run(model.publish_other(new))
    after = distribution(model, replace(request, adapter=new))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.01
    # and what is measured and what is sampled are the same weights
    (made,) = ask(model, replace(request, adapter=new))
    assert made.choice is not None
    assert math.exp(sum(made.logprobs)) == pytest.approx(after[made.choice], rel=0.01)
    # other models are not touched
    bare, untrained = (distribution(model, request_(10, a, choices=CHOICES)) for a in (None, UNTRAINED))
    assert untrained == pytest.approx(bare, abs=1e-4)


@pytest.mark.parametrize("missing", [AdapterVersion("stranger", 0), AdapterVersion("trained", 99)])
def test_a_version_that_was_never_published_is_refused(model: Subject, missing: AdapterVersion) -> None:
    with pytest.raises(EngineError, match=missing.name) as refused:
        ask(model, request_(adapter=missing))
    assert not isinstance(refused.value, RequestError)  # it is not the request's fault
    assert ask(model, request_())[0].token_ids  # the engine goes on


def test_a_prompt_that_does_not_fit_is_refused(model: Subject) -> None:
    with pytest.raises(RequestError, match="token"):
        ask(model, request_(prompt_ids=prompt(0, 4000)))
    assert ask(model, request_())[0].token_ids


def test_turns_of_one_episode_may_follow_each_other_while_others_wait(subject: Subject) -> None:
    async def episode(number: int) -> list[tuple[int, ...]]:
        said, heard = [], prompt(number)
        for turn in range(3):
            made = await subject.engine.generate(
                GenerateRequest(heard, TRAINED, seed=10 * number + turn, max_tokens=2 + number % 3)
            )
            said.append(made.token_ids)
            heard += made.token_ids
        return said

    async def all_at_once(numbers: Sequence[int]) -> list[list[tuple[int, ...]]]:
        return list(await asyncio.gather(*map(episode, numbers)))

    together = run(all_at_once(range(6)))
    assert together == [run(all_at_once([number]))[0] for number in range(6)]


def test_it_serves_again_after_its_callers_were_cancelled(subject: Subject) -> None:
    """As after Ctrl-C in a notebook: the next cycle runs in an event loop of its own."""

    async def interrupted() -> None:
        waiting = asyncio.ensure_future(subject.engine.generate(request_(1, max_tokens=50)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    expected = ask(subject, request_(2, max_tokens=4))[0]
    run(interrupted())
    assert ask(subject, request_(2, max_tokens=4))[0].token_ids == expected.token_ids


def test_closing_twice_is_fine(subject: Subject) -> None:
    run(subject.engine.close())
    run(subject.engine.close())


def test_the_same_weights_mean_the_same_turn_in_the_process_and_served(tiny_path: Path, tmp_path: Path) -> None:
    requests = [request_(n, (TRAINED, None, UNTRAINED)[n % 3], choices=CHOICES, temperature=1.3) for n in range(12)]
    requests += [replace(request, bias={10: 1.0, 13: -0.5}) for request in requests]
    with local(tiny_path, tmp_path) as here, served(tiny_path, tmp_path) as there:
        ours, theirs = ask(here, *requests), ask(there, *requests)
        texts = [request_(n, TRAINED, max_tokens=3, temperature=0.0) for n in range(4)]
        said, also_said = ask(here, *texts), ask(there, *texts)
    for one, other in zip(ours + said, theirs + also_said, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.allowed == other.allowed
        assert one.choice == other.choice
    for one, other in zip(ours, theirs, strict=True):
        assert one.entropy == pytest.approx(other.entropy, abs=1e-4)
