"""Compiled kernels give what torch's operations give, whatever the storage type and the number of threads."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.lm.adapter import Adapter, AdapterPool
from coterie.lm.functions import add_rms_norm, rms_norm, rotate, swiglu
from coterie.lm.native import build
from coterie.lm.native.kernels import Kernels, kernels_for
from coterie.lm.native.operands import Outer, Ranges, Sights
from coterie.training.loss import chosen, entropy
from tests.support.compiled import need_kernels

CPU = torch.device("cpu")
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return need_kernels(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of the type found."""
    torch.testing.assert_close(found.float(), expected.float(), **CLOSE[found.dtype])


def _wide(x: Tensor) -> Tensor:
    return x.detach().float().requires_grad_()


@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (70, 576)])
def test_norms(kernels: Kernels, threads: int, shape: tuple[int, int]) -> None:
    x, grad = (_random(*shape, dtype=kernels.dtype, seed=seed) for seed in (1, 2))
    weight = torch.rand(shape[1]) + 0.5
    plain, own = _wide(x), x.clone().requires_grad_()
    expected = rms_norm(plain, weight, 1e-5)
    expected.backward(grad.float())  # type: ignore[no-untyped-call]
    found = rms_norm(own, weight, 1e-5, kernels)
    found.backward(grad)  # type: ignore[no-untyped-call]
    _same(found, expected)
    assert plain.grad is not None
    assert own.grad is not None
    _same(own.grad, plain.grad)
    more = _random(*shape, dtype=kernels.dtype, seed=3)
    total = x.clone()
    summed = kernels.add_rms_norm(total, more, weight, 1e-5, total)
    assert torch.equal(total, x + more)
    assert torch.equal(summed, kernels.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_norms_of_sums(kernels: Kernels, threads: int, used: str) -> None:
    x, more, of_total, of_out = (_random(70, 40, dtype=kernels.dtype, seed=seed) for seed in range(4))
    weight = torch.rand(40) + 0.5
    with torch.no_grad():
        over = x.clone()
        total, normed = add_rms_norm(over, more, weight, 1e-5, kernels)
        assert total is over, "without gradients nothing is made beside the norm"
    gradients = []
    for compiled in (kernels, None):
        own = [part.clone().requires_grad_() if compiled else _wide(part) for part in (x, more)]
        found = add_rms_norm(own[0], own[1], weight, 1e-5, compiled)
        _same(total, found[0])
        _same(normed, found[1])
        torch.autograd.backward(
            [part for part, name in zip(found, ("sum", "norm"), strict=True) if used in ("both", name)],
            [part.to(found[0].dtype) for part, name in ((of_total, "sum"), (of_out, "norm")) if used in ("both", name)],
        )
        gradients.append([part.grad for part in own])
    for found_grad, expected in zip(*gradients, strict=True):
        assert found_grad is not None
        assert expected is not None
        _same(found_grad, expected)


def test_norms_of_slices(kernels: Kernels) -> None:
    whole = _random(6, 40, dtype=kernels.dtype)
    weight = torch.rand(24)
    assert torch.equal(kernels.rms_norm(whole[:, 8:32], weight, 1e-5),
                       kernels.rms_norm(whole[:, 8:32].contiguous(), weight, 1e-5))  # fmt: skip


def test_rotation(kernels: Kernels, threads: int) -> None:
    whole = _random(37, 4 * 16 + 8, dtype=kernels.dtype)
    angle = _random(37, 1, 8, dtype=torch.float32, seed=1)
    cos, sin = angle.cos().to(kernels.dtype), angle.sin().to(kernels.dtype)
    heads = whole[:, : 4 * 16].view(37, 4, 16)
    plain, own = _wide(heads), heads.detach().requires_grad_()
    expected = rotate(plain, cos.float(), sin.float())
    found = rotate(own, cos, sin, kernels)
    _same(found, expected)
    grad = _random(37, 4, 16, dtype=kernels.dtype, seed=2)
    expected.backward(grad.float())  # type: ignore[no-untyped-call]
    found.backward(grad)  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert own.grad is not None
    _same(own.grad, plain.grad)


def test_gates(kernels: Kernels, threads: int) -> None:
    whole = _random(19, 2 * 50, dtype=kernels.dtype) * 8
    gate, up = whole.split(50, dim=1)
    inputs = [_wide(gate), _wide(up), gate.detach().requires_grad_(), up.detach().requires_grad_()]
    expected, found = swiglu(*inputs[:2]), swiglu(*inputs[2:], kernels)
    _same(found, expected)
    grad = _random(19, 50, dtype=kernels.dtype, seed=2)
    expected.backward(grad.float())  # type: ignore[no-untyped-call]
    found.backward(grad)  # type: ignore[no-untyped-call]
    for plain, own in zip(inputs[:2], inputs[2:], strict=True):
        assert plain.grad is not None
        assert own.grad is not None
        _same(own.grad, plain.grad)


@pytest.mark.parametrize(("group", "dim"), [(1, 8), (3, 64), (2, 64), (5, 64), (4, 128), (3, 6)])
def test_cached_attention(kernels: Kernels, threads: int, group: int, dim: int) -> None:
    """Three sequences with a common beginning, two tokens of one of them new, against attention spelled out."""
    dtype, kv = kernels.dtype, 2
    pool_k, pool_v = (_random(kv, 30, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    q = _random(4, kv * group, dim, dtype=dtype, seed=3)
    k, v = (_random(4, kv, dim, dtype=dtype, seed=seed) for seed in (4, 5))
    angle = _random(4, 1, dim // 2, dtype=torch.float32, seed=6)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    paths = [[7, 8, 20], [7, 8, 9, 21], [3, 22], [3, 22, 23]]
    own = torch.tensor([path[-1] for path in paths])
    lists = torch.tensor([slot for path in paths for slot in path], dtype=torch.int32)
    first = torch.tensor([0, 3, 7, 9])
    seen = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    before = pool_k.clone()
    found = kernels.attend(q, k, v, cos, sin, pool_k, pool_v, own, Sights(lists, first, seen, 4), 0.3)
    turned_q, turned_k = (rotate(x.float(), cos.float(), sin.float()) for x in (q, k))
    _same(pool_k[:, own], turned_k.transpose(0, 1))
    assert torch.equal(pool_v[:, own], v.transpose(0, 1))
    untouched = [slot for slot in range(30) if slot not in own.tolist()]
    assert torch.equal(pool_k[:, untouched], before[:, untouched])
    for token, path in enumerate(paths):
        for head in range(kv * group):
            keys, values = (pool[head // group, path].float() for pool in (pool_k, pool_v))
            weights = (keys @ turned_q[token, head] * 0.3).softmax(0)
            _same(found[token, head * dim : (head + 1) * dim], (weights @ values).to(dtype))


@pytest.mark.parametrize("lengths", [[1], [5, 1], [4, 0, 9], [16, 16, 16, 16]])
@pytest.mark.parametrize("fans", [(24, 40), (37, 19), (576, 192)])
def test_low_rank_updates(kernels: Kernels, threads: int, lengths: list[int], fans: tuple[int, int]) -> None:
    fan_in, fan_out = fans
    sizes = (("one", fan_in, fan_out), ("two", fan_in, 16))
    pools = {rank: AdapterPool(sizes, rank, CPU) for rank in (4, 7)}
    segments: list[tuple[Adapter, int, int]] = []
    for number, length in enumerate(lengths):
        adapter = Adapter(pools[4 if number % 2 else 7], 16.0 + number, trainable=False)
        adapter.flat.normal_(generator=torch.Generator().manual_seed(number)).div_(8)
        start = segments[-1][2] if segments else 2
        segments.append((adapter, start, start + length))
    x = _random(sum(lengths) + 3, fan_in, dtype=kernels.dtype) / math.sqrt(fan_in)
    whole = _random(len(x), fan_out + 16, dtype=kernels.dtype, seed=1)
    outs = whole.clone().split([fan_out, 16], dim=1)
    ranges = Ranges(segments, kernels.dtype)
    kernels.add_low_rank(x, [("one", outs[0]), ("two", outs[1])], ranges)
    for name, found, before in zip(("one", "two"), outs, whole.split([fan_out, 16], dim=1), strict=True):
        expected = before.float().clone()
        for adapter, start, end in segments:
            a, b = adapter.factors(kernels.dtype)[name]
            expected[start:end] += adapter.scaling * (x[start:end].float() @ a.float().t()) @ b.float()
        _same(found, expected)
    copy = ref(segments[0][0].factors(kernels.dtype))
    again = Ranges(segments, kernels.dtype, ranges.addresses)
    assert again.addresses is ranges.addresses
    segments[0][0].touch()
    assert Ranges(segments, kernels.dtype, ranges.addresses).addresses is not ranges.addresses
    known = again.addresses
    del ranges, again, adapter, a, b
    assert known is not None
    assert copy() is None, "addresses that are remembered keep an adapter's former weights"


@pytest.mark.parametrize("rank", [1, 4, 7, 16])
@pytest.mark.parametrize("sizes", [(3, 40, 8), (300, 19, 33), (130, 64, 192)])
def test_gradients_of_factors(kernels: Kernels, threads: int, rank: int, sizes: tuple[int, int, int]) -> None:
    tokens, fan_in, fan_out = sizes
    grad_h, h = (_random(tokens, rank, dtype=kernels.dtype, seed=seed) for seed in (1, 2))
    x = _random(tokens, fan_in + 5, dtype=kernels.dtype, seed=3)[:, :fan_in]
    grad = _random(tokens, fan_out, dtype=kernels.dtype, seed=4)
    of_a, of_b = torch.ones(rank, fan_in), torch.ones(fan_out, rank)
    kernels.low_rank_gradients([Outer(grad_h, x, of_a, False, 0.5), Outer(h, grad, of_b, True, 0.25)])
    torch.testing.assert_close(of_a, 1 + 0.5 * grad_h.float().t() @ x.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_b, 1 + 0.25 * grad.float().t() @ h.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 40, 300)])
def test_masked_softmax_and_its_derivative(kernels: Kernels, threads: int, shape: tuple[int, int, int]) -> None:
    heads, n, keys = shape
    scores = _random(*shape, dtype=kernels.dtype) * 4
    visible = torch.rand(n, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 0] = True
    plain = _wide(scores)
    expected = (plain * 0.2).masked_fill(~visible, -torch.inf).softmax(-1)
    found = kernels.masked_softmax(scores.clone(), visible, 0.2)
    _same(found, expected)
    assert bool((found[:, ~visible] == 0).all())
    values = _random(heads, keys, 8, dtype=torch.float32, seed=2)
    out = expected @ values
    grad = _random(heads, n, 8, dtype=torch.float32, seed=3)
    out.backward(grad)  # type: ignore[no-untyped-call]
    spread = (grad @ values.transpose(1, 2)).to(kernels.dtype)
    kernels.softmax_scores_backward(spread, found, grad.to(kernels.dtype), out.detach().to(kernels.dtype), 0.2)
    assert plain.grad is not None
    _same(spread, plain.grad)


@pytest.mark.parametrize("size", [3, 256, 700])
def test_draws_are_those_of_the_cumulative_probability(kernels: Kernels, threads: int, size: int) -> None:
    logits = _random(3, size, dtype=kernels.dtype) * 3
    logits[1, : size // 2] = -1e30  # forbidden
    temperatures = [1.0, 0.7, 2.0]
    uniforms = [0.0, 0.2, 0.999999, -1.0]
    rows = [row for row in range(3) for _ in uniforms]
    tokens, logprobs, entropies = kernels.sample(logits, rows, uniforms * 3, temperatures)
    for row in range(3):
        exact = (logits[row].double() / temperatures[row]).log_softmax(-1)
        cumulative = exact.exp().cumsum(-1)
        assert entropies[row] == pytest.approx(float(-(exact.exp() * exact).sum()), abs=1e-4)
        for number, u in enumerate(uniforms):
            token, logprob = tokens[4 * row + number], logprobs[4 * row + number]
            assert logprob == pytest.approx(float(exact[token]), abs=1e-4)
            if u < 0:
                assert token == int(logits[row].float().argmax())
            else:
                before = float(cumulative[token - 1]) if token else 0.0
                assert before - 1e-5 <= u <= float(cumulative[token]) + 1e-5
                assert float(exact[token].exp()) > 0


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_gradient_of_chosen_log_probabilities(data: st.DataObject) -> None:
    kernels = need_kernels()
    rows, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 300))
    picks = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, size - 1)), min_size=1, max_size=6))
    temperature = data.draw(st.sampled_from([1.0, 0.5, 1.7]))
    logits = _random(rows, size, dtype=torch.float32, seed=data.draw(st.integers(0, 99))).mul_(3).requires_grad_()
    plain = logits.detach().clone().requires_grad_()
    at, tokens = (torch.tensor(column) for column in zip(*picks, strict=True))
    weights = torch.linspace(-1, 1, len(picks))
    logprob, spread = chosen(kernels, logits, at, tokens, temperature)
    ((logprob * weights).sum() + 0.3 * spread.sum()).backward()  # type: ignore[no-untyped-call]
    expected = (plain / temperature).log_softmax(-1)
    ((expected[at, tokens] * weights).sum() + 0.3 * entropy(expected).sum()).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logprob, expected[at, tokens], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread, entropy(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_other_devices_and_types_have_none() -> None:
    assert kernels_for(torch.float64, CPU) is None
    assert kernels_for(torch.float32, torch.device("meta")) is None


# -- the build ---------------------------------------------------------------------------------------------------------


def test_a_switch_leaves_them_out(tmp_path: Path) -> None:
    found = build.build(build.SOURCE, tmp_path, {build.SWITCH: "0"})
    assert found.path is None
    assert build.SWITCH in found.problem
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = build.build(build.SOURCE, tmp_path / "cache", {})
    assert found.path is None
    assert "compiler" in found.problem


def _compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _compiler(tmp_path, "echo 'kernels.cpp:1: cannot' >&2; exit 1")
    monkeypatch.setenv("PATH", "/usr/nowhere")
    found = build.build(build.SOURCE, tmp_path / "cache", {"CXX": name})
    assert found.path is None
    assert "kernels.cpp:1: cannot" in found.problem
    assert not list((tmp_path / "cache").glob("*"))


def test_a_library_that_cannot_be_loaded_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _compiler(tmp_path, 'for last; do :; done; echo no library > "$last"')
    monkeypatch.setenv("PATH", "/usr/nowhere")
    found = build.build(build.SOURCE, tmp_path / "cache", {"CXX": name})
    assert found.path is None
    assert not list((tmp_path / "cache").glob("*"))


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    real = build._run

    def run(command: list[str]) -> None:
        ran.append(command)
        real(command)

    monkeypatch.setattr(build, "_run", run)
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n', encoding="utf-8")
    try:
        subprocess.run(["c++", "--version"], check=True, capture_output=True)
    except OSError:
        pytest.skip("no C++ compiler here")
    assert build.find(source, tmp_path / "cache", {}).compiler
    first = build.build(source, tmp_path / "cache", {})
    assert build.find(source, tmp_path / "cache", {}) == first
    again = build.build(source, tmp_path / "cache", {})
    assert first.path is not None
    assert first == again
    assert len(ran) == 1
    source.write_text('extern "C" int seven() { return 8; }\n', encoding="utf-8")
    assert build.build(source, tmp_path / "cache", {}).path != first.path
