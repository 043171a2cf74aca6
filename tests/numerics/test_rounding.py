"""Rounding in the metric of the inputs: what is on the grid, and what it loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reparam_peft.numerics.decompositions import Factors, factorize
from reparam_peft.numerics.rounding import Grid, rotated, rounded, rounded_pair


def case(inputs: int = 150, rows: int = 400) -> tuple[Tensor, Tensor]:
    """A matrix (40, inputs), and the Gram of inputs of which some are large and most go together."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, 12, generator=generator) @ torch.randn(12, inputs, generator=generator)
    X = (X + 0.3 * torch.randn(rows, inputs, generator=generator)).double()
    X[:, 5] *= 8
    return torch.randn(40, inputs, generator=generator), X.mT @ X


def coarse(weight: Tensor) -> Grid:
    """Fifteen levels, and a scale for each row."""
    return Grid(weight.abs().amax(1, keepdim=True) / 7, torch.arange(-7, 8).double())


def error(difference: Tensor, gram: Tensor) -> float:
    return float(((difference @ gram) * difference).sum())


@pytest.mark.parametrize("inputs", [1, 150])  # 150 are passed on in two blocks
def test_rounded_is_on_the_grid_and_loses_less_than_the_nearest(inputs: int) -> None:
    W, G = case(max(inputs, 6))
    W, G = W[:, :inputs].double(), G[:inputs, :inputs]
    grid = coarse(W)
    numbers, of = rounded(W, grid, G)
    assert of is grid
    assert torch.equal(grid.nearest(numbers), numbers)
    nearest = error(W - grid.nearest(W), G)
    assert error(W - numbers, G) <= nearest * (0.25 if inputs > 1 else 1)


@pytest.mark.parametrize("gram", [torch.ones(150), torch.zeros(150, 150), torch.eye(150)], ids=["diagonal", "zero", "identity"])
def test_independent_inputs_are_rounded_to_nearest(gram: Tensor) -> None:
    W, _ = case()
    grid = coarse(W.double())
    assert torch.equal(rounded(W, grid, gram).numbers, grid.nearest(W.double()))


def test_a_scale_for_each_number_follows_its_column() -> None:
    W, G = case()
    W = W.double()
    grid = Grid(coarse(W).scale * torch.linspace(0.5, 2, 150), coarse(W).levels)
    numbers, _ = rounded(W, grid, G)
    assert torch.equal(grid.nearest(numbers), numbers)


def test_a_singular_gram_and_one_of_few_rows() -> None:
    W, _ = case()
    X = torch.randn(3, 150, dtype=torch.float64)
    numbers, _ = rounded(W, coarse(W.double()), X.mT @ X)
    assert numbers.isfinite().all()


def test_a_gram_of_another_matrix_is_refused() -> None:
    W, _ = case()
    with pytest.raises(ValueError, match=r"`gram` must have shape \(150, 150\)"):
        rounded(W, coarse(W), torch.eye(3))


@pytest.mark.parametrize("rounds_left", [True, False])
def test_a_pair_loses_far_less_than_its_nearest_numbers(rounds_left: bool) -> None:
    W, G = case()
    factors = factorize(W.double(), 20, G)
    product = factors.A @ factors.B
    nearest = [coarse(factor).nearest(factor) for factor in factors]
    L, M = rounded_pair(*rotated(factors), G, coarse, rounds_left)
    assert M.grid is not None
    assert (L.grid is not None) == rounds_left
    assert error(product - L.numbers @ M.numbers, G) < 0.5 * error(product - nearest[0] @ nearest[1], G)


def test_the_fit_is_the_best_for_the_rounded_matrix() -> None:
    W, G = case()
    factors = Factors(*factorize(W.double(), 20, G))
    L, M = rounded_pair(*factors, G, coarse, rounds_left=False)
    residual = (factors.A @ factors.B - L.numbers @ M.numbers) @ G @ M.numbers.mT
    assert residual.abs().max() < 1e-8 * (W.double() @ G @ M.numbers.mT).abs().max()
