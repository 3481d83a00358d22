from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.lm.functions import rms_norm, rotate
from coterie.lm.native.kernels import Kernels
from coterie.lm.products import LEAST_ROWS, LEAST_TRANSPOSED, MOST_TRANSPOSED, BackMatrix, OutputMatrix, frozen_linear
from tests.support.compiled import need_kernels


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, LEAST_TRANSPOSED, 40, MOST_TRANSPOSED, MOST_TRANSPOSED + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_give_what_a_linear_layer_gives(threads: int, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(rows, 24)
    with torch.no_grad():
        found = frozen_linear(x, layer.weight, layer.bias)
        assert found.is_contiguous()
        torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, 7, 300])
def test_the_output_matrix_gives_plain_logits(rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(300, 24, requires_grad=True)
    hidden = torch.randn(rows, 24, requires_grad=True)
    output = OutputMatrix(weight)
    with torch.no_grad():
        torch.testing.assert_close(output(hidden), hidden @ weight.t())
    grad = torch.randn(rows, 300)
    output(hidden).backward(grad)  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, grad @ weight.detach())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_the_way_back_is_the_sum_over_siblings(pack: bool, rows: int) -> None:
    torch.manual_seed(rows)
    weights = [torch.randn(out, 24) for out in (40, 16)]
    grads = [torch.randn(rows, 40), torch.randn(rows, 16)]
    back = BackMatrix(weights, pack=pack)
    torch.testing.assert_close(back(grads), grads[0] @ weights[0] + grads[1] @ weights[1])
    torch.testing.assert_close(BackMatrix(weights[:1], pack=pack)(grads[:1]), grads[0] @ weights[0])


@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (17, 24), (300, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_our_product_is_that_of_a_linear_layer(threads: int, shape: tuple[int, int], bias: bool) -> None:
    kernels = _panels_wanted()
    out, size = shape
    layer = torch.nn.Linear(size, out, bias=bias)
    with torch.no_grad():
        panels = kernels.panels(layer.weight, layer.bias)
        for rows in (1, 2, 5, 6, 7, 13, 400, 800):
            wide = torch.randn(rows, size + 3)
            torch.testing.assert_close(kernels.product([wide[:, :size]], panels), layer(wide[:, :size]))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 90), st.integers(1, 70), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_what_a_row_gives_depends_on_that_row_alone(sizes: list[int], rows: int, out: int, seed: int) -> None:
    kernels = _panels_wanted()
    torch.manual_seed(seed)
    parts = [torch.randn(rows, size) for size in sizes]
    weight = torch.randn(sum(sizes), out).t()
    panels = kernels.panels(weight)
    found = kernels.product(parts, panels)
    torch.testing.assert_close(found, torch.cat(parts, dim=1) @ weight.t(), rtol=1e-4, atol=1e-4)
    row = seed % rows
    assert torch.equal(kernels.product([part[row : row + 1] for part in parts], panels)[0], found[row])
    assert torch.equal(kernels.product([torch.cat([part[row:], part]) for part in parts], panels)[rows - row :], found)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernels.product(parts, panels), found)
    finally:
        torch.set_num_threads(before)


def _panels_wanted() -> Kernels:
    kernels = need_kernels()
    if not kernels.panel:
        pytest.skip("matrix libraries are better on this processor")
    return kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_and_its_derivative(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.rand(8) + 0.5
    grad = torch.randn(3, 2, 8)
    wide = x.detach().to(dtype).requires_grad_()
    plain = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.to(dtype)
    plain.backward(grad.to(dtype))  # type: ignore[no-untyped-call]
    found = rms_norm(x, weight, 1e-5)
    found.backward(grad)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.to(dtype), plain)
    assert wide.grad is not None
    torch.testing.assert_close(x.grad, wide.grad.float())


def test_rotation_and_its_derivative() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(5, 1, 4, dtype=torch.float64)
    first, second = x[..., :4], x[..., 4:]
    plain = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), plain)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angle.cos(), angle.sin()), [x])
