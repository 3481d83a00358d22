"""Sibling layers as one product give what each of them gives, adapters of any lengths and companies included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from coterie.lm.adapter import Adapter, AdapterPool
from coterie.lm.linear import BankLinear, Siblings
from coterie.lm.products import LEAST_ROWS
from coterie.lm.route import PADDED_SEGMENTS, Route
from tests.support.compiled import need_kernels

CPU = torch.device("cpu")
SIZES = (("q", 24, 32), ("k", 24, 16))


def _adapters(count: int, alphas: Sequence[float] = (16.0,), rank: int = 4) -> list[Adapter]:
    pool = AdapterPool(SIZES, rank, CPU)
    made = [Adapter(pool, alphas[n % len(alphas)], trainable=False) for n in range(count)]
    for number, adapter in enumerate(made):
        adapter.flat.normal_(generator=torch.Generator().manual_seed(number))
    return made


def _layers(route: Route, *, bias: bool) -> list[nn.Module]:
    torch.manual_seed(1)
    plain = [nn.Linear(24, out, bias=bias) for out in (32, 16, 8)]
    return [BankLinear(plain[0], "q", route), BankLinear(plain[1], "k", route), plain[2]]


def _expected(x: torch.Tensor, layers: Sequence[nn.Module], route: Route) -> list[torch.Tensor]:
    outs = [nn.functional.linear(x, layer.weight, layer.bias) for layer in layers]  # type: ignore[arg-type]
    for adapter, start, end in route.segments:
        for out, name in zip(outs, ("q", "k"), strict=False):
            a, b_t = adapter.factors(x.dtype)[name]
            out[start:end] += adapter.scaling * (x[start:end] @ a.t()) @ b_t
    return outs


def _segments(adapters: Sequence[Adapter], lengths: Sequence[int], first: int = 0) -> list[tuple[Adapter, int, int]]:
    found = []
    for adapter, length in zip(adapters, lengths, strict=True):
        found.append((adapter, first, first + length))
        first += length
    return found


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([], id="no adapter"),
        pytest.param([5], id="one"),
        pytest.param([4, 4, 4], id="even"),
        pytest.param([4, 3, 9], id="uneven"),
        pytest.param([3] * PADDED_SEGMENTS + [1], id="padded"),
        pytest.param([80, 20], id="long and short"),
        pytest.param([1, 1], id="few rows"),
    ],
)
@pytest.mark.parametrize("alphas", [(16.0,), (16.0, 4.0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_siblings_are_their_layers(
    pack: bool, bias: bool, lengths: list[int], alphas: tuple[float, ...], compiled: bool
) -> None:
    route = Route(need_kernels() if compiled else None)
    layers = _layers(route, bias=bias)
    siblings = Siblings(layers, pack=pack)
    adapters = _adapters(len(lengths), alphas)
    extra = 1
    rows = sum(lengths) + extra  # tokens in no range
    assert (rows < LEAST_ROWS) == (sum(lengths) in (0, 2))
    x = torch.randn(rows, 24)
    with torch.no_grad():
        route.lead(_segments(adapters, lengths, first=extra), CPU)
        for found, expected in zip(siblings(x), _expected(x, layers, route), strict=True):
            # sums of terms up to a hundred times as large
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2], [0, 2]])
def test_ranges_in_another_order_than_their_adapters(order: list[int]) -> None:
    route = Route()
    layers = _layers(route, bias=False)
    adapters = _adapters(3)
    x = torch.randn(4 * len(order), 24)
    with torch.no_grad():
        route.lead(_segments([adapters[n] for n in order], [4] * len(order)), CPU)
        for found, expected in zip(Siblings(layers, pack=True)(x), _expected(x, layers, route), strict=True):
            torch.testing.assert_close(found, expected)


def test_gradients_reach_the_adapters_through_siblings() -> None:
    route = Route()
    layers = _layers(route, bias=False)
    adapter = Adapter(AdapterPool(SIZES, 4, CPU), 16.0, trainable=True)
    adapter.initialise(0)
    route.lead([(adapter, 0, 8)], CPU)
    q, k, _ = Siblings(layers, pack=True)(torch.randn(8, 24))
    (q.sum() + k.sum()).backward()  # type: ignore[no-untyped-call]
    assert adapter.grad is not None
    assert adapter.grad.abs().sum() > 0
