"""Attention within a pass, compiled and composed, against attention spelled out along every token's own path."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.lm.attention import TreePlan
from coterie.lm.forest import Forest, pack
from coterie.lm.native.kernels import Kernels
from tests.support.compiled import need_kernels

Sequences = list[tuple[int, tuple[int, ...]]]


def _spelled_out(forest: Forest, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In float64, one sequence after another."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    done: set[int] = set()
    for path, _ in zip(forest.paths, sequences, strict=True):
        places = [int(place) for place in path]
        for depth, place in enumerate(places):
            if place in done:
                continue
            done.add(place)
            seen = places[: depth + 1]
            keys = k[seen].repeat_interleave(group, dim=1)
            values = v[seen].repeat_interleave(group, dim=1)
            weights = (torch.einsum("hd,nhd->hn", q[place], keys) * scale).softmax(-1)
            out = out.index_put((torch.tensor([place]),), torch.einsum("hn,nhd->hd", weights, values)[None])
    return out


def _compare(sequences: Sequences, kv: int, group: int, dim: int, close: float = 1e-4) -> None:
    forest = pack(sequences)
    generator = torch.Generator().manual_seed(forest.size)
    # as the model gives them: values are a slice of a wider tensor
    wide = torch.randn(forest.size, kv * (group + 2), dim, generator=generator)
    grad = torch.randn(forest.size, kv * group, dim, generator=generator)
    given_parts = wide.split([kv * group, kv, kv], dim=1)
    exact = [part.double().requires_grad_() for part in given_parts]
    expected = _spelled_out(forest, sequences, *exact, 0.3)
    expected.backward(grad.double())  # type: ignore[no-untyped-call]
    own = [part.detach().requires_grad_() for part in given_parts]
    found = forest.plan().attend(0, *own, 0.3)
    found.backward(grad)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    for part, whole in zip(own, exact, strict=True):
        assert part.grad is not None
        assert whole.grad is not None
        torch.testing.assert_close(part.grad.double(), whole.grad, rtol=close, atol=close)


@st.composite
def _drawn(draw: st.DrawFn) -> Sequences:
    """A few policies' sequences over two tokens: they share beginnings, end inside one another, and repeat."""
    length = st.integers(1, 14)
    tokens = length.flatmap(lambda n: st.lists(st.integers(0, 1), min_size=n, max_size=n).map(tuple))
    return draw(st.lists(st.tuples(st.integers(0, 2), tokens), min_size=1, max_size=9))


@pytest.fixture(params=["compiled", "composed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "compiled":
        need_kernels(torch.float32)
    else:
        monkeypatch.setattr(Kernels, "attends_trees", lambda *_: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (2, 64), (3, 64), (4, 128), (7, 48), (8, 32), (5, 16), (2, 6)])
def test_every_token_sees_its_own_path(group: int, dim: int) -> None:
    @settings(max_examples=10)
    @given(_drawn())
    def check(sequences: Sequences) -> None:
        _compare(sequences, 2, group, dim)

    check()


@pytest.mark.usefixtures("way")
def test_answers_to_long_prompts() -> None:
    """More probabilities than are kept at a time, in chains of all lengths."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(9) for _ in range(length)) for length in (211, 97)]
    sequences = [
        (number, prompt + tuple(rng.randrange(9) for _ in range(rng.randrange(1, 40))))
        for number, prompt in enumerate(prompts)
        for _ in range(6)
    ]
    _compare(sequences, 1, 8, 16)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    kernels = need_kernels(torch.float32)
    plan: TreePlan = pack([(0, (1,) * 40 + (2, 3) * n) for n in range(1, 9)]).plan()
    tokens = len(plan.sights.seen)
    q, grad = (torch.randn(tokens, 6, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    k, v = (torch.randn(tokens, 2, 64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = kernels.attend_tree(q, k, v, plan.sights, 0.2)
            results.append((out, *kernels.attend_tree_backward(grad, out, q, k, v, plan.sights, 0.2)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(others, results[0], strict=True))
