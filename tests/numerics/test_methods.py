"""The table of methods says what is true of each."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from support.tolerances import relative_error

from reparam_peft.numerics.decompositions import factorize, random_factors
from reparam_peft.numerics.methods import METHODS, Method, MethodName, names_of_methods

methods = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (12, 9), a Gram matrix of its inputs and one of its output gradients, float64."""
    generator = torch.Generator().manual_seed(0)
    W, X, g = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for rows, columns in
               ((12, 9), (40, 9), (60, 12)))  # fmt: skip
    X, g = X * torch.logspace(0, -1, 9, dtype=torch.float64), g * torch.logspace(0, -1, 12, dtype=torch.float64)
    return W, X.T @ X, g.T @ g


def test_a_row_stands_under_its_name() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS) == list(get_args(MethodName))
    assert {*names_of_methods(needs_data=True), *names_of_methods(needs_data=False)} == set(METHODS)
    assert not {*names_of_methods(needs_data=True)} & {*names_of_methods(needs_data=False)}


@methods
def test_factors_have_the_rank_and_the_dtype(method: Method) -> None:
    W, gram, fisher = problem()
    metrics = (gram, fisher) if method.needs_data else (None, None)
    for dtype in (torch.float32, torch.float64):
        A, B = method.function(W.to(dtype), 4, *metrics, None)
        assert (A.shape, B.shape) == ((12, 4), (4, 9))
        assert A.dtype == B.dtype == dtype


@methods
def test_factors_are_the_best_in_the_methods_own_error(method: Method) -> None:
    W, gram, fisher = problem()
    metrics = (gram, fisher) if method.needs_data else (None, None)
    A, B = method.function(W, 4, *metrics, None)
    best = factorize(W, 4, *metrics)
    assert relative_error(A @ B, best.A @ best.B) < 1e-4


@methods
def test_lower_ranks_are_the_first_columns_where_the_table_says_so(method: Method) -> None:
    W, gram, fisher = problem()
    metrics = (gram, fisher) if method.needs_data else (None, None)
    (A, B), (lower_A, lower_B) = (method.function(W, rank, *metrics, None) for rank in (6, 3))
    assert (relative_error(A[:, :3] @ B[:3], lower_A @ lower_B) < 1e-6) == method.nested


@methods
def test_a_method_begins_with_the_factors_that_it_is_given(method: Method) -> None:
    W, gram, fisher = problem()
    metrics = (gram, fisher) if method.needs_data else (None, None)
    torch.manual_seed(0)
    start = random_factors(W, 4)
    A, B = method.function(W, 4, *metrics, start)

    def error(product: torch.Tensor) -> float:
        E = W - product
        return float(torch.trace(fisher @ E @ gram @ E.T)) if method.needs_data else float(E.square().sum())

    assert error(A @ B) <= error(start.A @ start.B)
