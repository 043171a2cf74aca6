"""How matrices are stored in 8 and 4 bits: packed and read back to the number, and what no matrix has is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from reparam_peft.layers.schemes import SCHEME_OF, check_scheme
from reparam_peft.numerics.storage import matrix_bytes, scale_shape

SHAPES = [(8, 64), (7, 33), (1, 16), (5, 17)]  # rows that end within a block, and an odd number of numbers
WIDTHS = pytest.mark.parametrize("bits", [8, 4])


@WIDTHS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_on_a_grid_are_packed_and_read_back(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme, W = SCHEME_OF[bits], torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = scheme.grid(W)
    numbers, scales = grid.nearest(W), scheme.scales_of(grid)
    assert scales.shape == scale_shape(*shape, bits)
    assert scales.dtype == torch.float32
    given = numbers.to(dtype)  # which moves them off the grid, by less than half a step
    tensors = scheme.packed(given.double(), scheme.grid_of(scales, shape))
    assert torch.equal(scheme.numbers(tensors, shape), numbers)
    empty = scheme.empty(*shape)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in empty.items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == matrix_bytes(*shape, bits, 2)
    scheme.check(tensors)


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_numbers_with_gradients_to_the_input(bits: int, dtype: torch.dtype) -> None:
    scheme, shape = SCHEME_OF[bits], (24, 64)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = scheme.packed(scheme.grid(W).nearest(W), scheme.grid(W))
    for rows in (1, 5):
        x = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
        y = scheme.multiply(tensors, shape, dtype)(x)
        assert torch.allclose(scheme.traced(x, tensors, shape).double(), y.double(), atol=8 * torch.finfo(dtype).eps * 16)
        tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * math.sqrt(64)
        numbers = scheme.numbers(tensors, shape)
        assert y.dtype == dtype
        assert torch.allclose(y.double(), x.double() @ numbers.mT, atol=4 * tolerance)
        y.sum().backward()
        assert torch.allclose(x.grad.double(), numbers.sum(0).expand(rows, -1), atol=8 * tolerance)


@WIDTHS
def test_sums_that_fit_half_precision_do_not_overflow_before_they_are_scaled(bits: int) -> None:
    scheme, shape = SCHEME_OF[bits], (4, 64)
    W = torch.full(shape, 0.01, dtype=torch.float64)
    tensors = scheme.packed(scheme.grid(W).nearest(W), scheme.grid(W))
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)
    layer = scheme.linear(nn.Linear(64, 4, bias=False), tensors, x.dtype)
    for y in (scheme.multiply(tensors, shape, x.dtype)(x), scheme.traced(x, tensors, shape), layer(x)):
        assert torch.allclose(y.double(), x.double() @ scheme.numbers(tensors, shape).mT, rtol=0.01)


@WIDTHS
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_scales_that_are_none_are_refused(bits: int, value: float) -> None:
    scheme = SCHEME_OF[bits]
    tensors = scheme.packed(torch.zeros(4, 32, dtype=torch.float64), scheme.grid(torch.zeros(4, 32, dtype=torch.float64)))
    tensors[scheme.scale].view(-1)[-1] = value
    with pytest.raises(ValueError, match="holds scales that are negative, NaN, or too large"):
        scheme.check(tensors)


def test_the_least_code_of_eight_bits_which_torchao_has_too_is_a_number() -> None:
    tensors = {"weight": torch.full((2, 16), -128, dtype=torch.int8), "weight_scale": torch.ones(2, 1)}
    scheme = SCHEME_OF[8]
    scheme.check(tensors)
    numbers = scheme.numbers(tensors, (2, 16))
    again = scheme.packed(numbers, scheme.grid_of(tensors["weight_scale"], (2, 16)))
    assert torch.equal(again["weight"], tensors["weight"])


def test_an_unknown_scheme_is_told() -> None:
    with pytest.raises(ValueError, match=r"`quantize` must be one of .* or None, got 'int2'"):
        check_scheme("int2")
