"""The pivot form against the product that it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import PROPERTY, activation_gram, matrices_and_ranks, matrix_with, spectrum
from support.tolerances import TOLERANCE, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reparam_peft.numerics.decompositions import Factors, factorize, random_factors
from reparam_peft.numerics.pivoting import LARGEST_COEFFICIENT, PivotFactors, other_rows, pivot
from reparam_peft.numerics.storage import Storage

WIDE = (torch.float64, torch.float32)


def product(factors: Factors | PivotFactors) -> Tensor:
    """A B in float64."""
    A, B = factors.factors() if isinstance(factors, PivotFactors) else factors
    return A.double() @ B.double()


@st.composite
def products(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = WIDE, truncated: bool = False) -> tuple[Factors, torch.dtype]:
    """Factors in float64 of a matrix of any spectrum, the zero matrix included, at any rank; and a dtype to round to."""
    weight, rank = draw(matrices_and_ranks(dtypes=dtypes, truncated=truncated))
    compute = draw(st.sampled_from([factorize, random_factors]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return compute(weight.double(), rank), weight.dtype


@PROPERTY
@given(products())
def test_is_lossless_but_for_rounding(case: tuple[Factors, torch.dtype]) -> None:
    factors, dtype = case
    result = pivot(factors, dtype=dtype)
    exact = product(factors)
    # K is at most 1.1, so that it carries the rounding of P on by √r at most.
    assert float((product(result) - exact).norm()) <= TOLERANCE[dtype] * float(exact.norm())
    assert result.P.dtype == result.K.dtype == dtype


@PROPERTY
@given(products())
def test_no_coefficient_is_much_larger_than_one(case: tuple[Factors, torch.dtype]) -> None:
    K = pivot(*case[:1]).K
    assert K.numel() == 0 or float(K.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9) == 1.1 * (1 + 1e-9)


@PROPERTY
@given(products((torch.float64, torch.float32, torch.bfloat16)))
def test_holds_rows_of_the_product_and_how_the_others_follow(case: tuple[Factors, torch.dtype]) -> None:
    factors, dtype = case
    P, K, pivots = result = pivot(factors, dtype=dtype)
    (out_features, rank), in_features = factors.A.shape, factors.B.shape[1]
    assert (P.shape, K.shape, pivots.shape) == ((rank, in_features), (out_features - rank, rank), (rank,))
    assert pivots.dtype == torch.int64
    assert pivots.tolist() == sorted(set(pivots.tolist()))
    assert P.is_contiguous()
    assert K.is_contiguous()
    assert torch.equal(P, (factors.A[pivots] @ factors.B).to(dtype)), "rounded once"
    rows = product(result)
    others = other_rows(pivots, out_features)
    assert torch.equal(torch.cat([pivots, others]).sort().values, torch.arange(out_features))
    assert torch.equal(rows[pivots], P.double())
    expected = K.double() @ P.double()
    assert float((rows[others] - expected).norm()) <= TOLERANCE[torch.float64] * float(expected.norm())
    assert P.numel() + K.numel() == Storage(out_features, in_features, "pivot").parameters(rank) - -(-out_features // 8)


@PROPERTY
@given(products((torch.bfloat16, torch.float16), truncated=True), st.booleans())
def test_fitting_to_rounded_rows_is_no_worse_than_rounding(case: tuple[Factors, torch.dtype], weighted: bool) -> None:
    factors, dtype = case
    gram = activation_gram(factors.B.shape[1]) if weighted else None
    exact, scale = product(factors), product(factors).abs().max().clamp(min=1e-300)
    root = torch.eye(len(exact.mT), dtype=torch.float64) if gram is None else torch.linalg.cholesky(gram)

    def error(result: PivotFactors) -> float:
        return float(((product(result) - exact) / scale @ root).norm())

    wide = pivot(factors)
    fitted, rounded = pivot(factors, gram, dtype), PivotFactors(wide.P.to(dtype), wide.K.to(dtype), wide.pivots)
    # Both round the coefficients, by half an eps of each, and to the one or the other side.
    others = other_rows(wide.pivots, len(exact))
    slack = torch.finfo(dtype).eps * float((wide.K.abs() @ wide.P.abs() / scale @ root.abs()).norm()) if len(others) else 0.0
    assert torch.equal(fitted.pivots, wide.pivots)
    assert error(fitted) <= error(rounded) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_fitting_to_rounded_rows_pays_on_weights_of_medium_size(weighted: bool, dtype: torch.dtype) -> None:
    weight = matrix_with(spectrum("polynomial", 120), 160, 120)
    gram = activation_gram(120) if weighted else torch.eye(120, dtype=torch.float64)
    root = torch.linalg.cholesky(gram)
    factors = factorize(weight, 60, gram)
    exact = product(factors)
    wide = pivot(factors)
    rounded = PivotFactors(wide.P.to(dtype), wide.K.to(dtype), wide.pivots)
    errors = [relative_error(product(result) @ root, exact @ root) for result in (pivot(factors, gram, dtype), rounded)]
    # Of the two roundings, of P and of K, only that of K is left.
    assert errors[0] < 0.95 * errors[1]
    assert errors[0] < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (4, 1)], ids=str)
def test_the_zero_matrix_stays_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for rank in range(1, min(shape) + 1):
        for A in (torch.ones(shape[0], rank), torch.zeros(shape[0], rank)):
            result = pivot(Factors(A, torch.zeros(rank, shape[1])), dtype=dtype)
            assert not product(result).any()
            assert result.K.numel() == 0 or float(result.K.abs().max()) <= 1.2


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_factors_that_are_rank_deficient_are_no_special_case(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(9, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    mixing = torch.randn(2, 4, dtype=torch.float64)
    factors = Factors(A @ mixing, torch.linalg.pinv(mixing) @ B)  # rank 2 as factors of rank 4
    result = pivot(factors, dtype=dtype)
    assert relative_error(product(result), A @ B) <= TOLERANCE[dtype]


@PROPERTY
@given(matrices_and_ranks(dtypes=WIDE))
def test_at_full_rank_it_is_the_matrix(case: tuple[Tensor, int]) -> None:
    weight, _ = case
    out_features, in_features = weight.shape
    result = pivot(factorize(weight, min(weight.shape)))
    if out_features <= in_features:
        assert result.K.shape == (0, out_features)
        assert torch.equal(result.P, weight)
        assert torch.equal(result.pivots, torch.arange(out_features))
    else:
        assert torch.equal(result.P, weight[result.pivots])
        assert float((product(result) - weight.double()).norm()) <= TOLERANCE[weight.dtype] * float(weight.double().norm())


@PROPERTY
@given(products())
def test_is_deterministic_and_leaves_its_input_alone(case: tuple[Factors, torch.dtype]) -> None:
    factors = Factors(*(factor.clone().requires_grad_() for factor in case[0]))
    before = [factor.detach().clone() for factor in factors]
    first, second = pivot(factors), pivot(factors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not any(tensor.requires_grad for tensor in first)
    assert all(torch.equal(factor, old) for factor, old in zip(factors, before, strict=True))
    assert first.P.dtype == factors.B.dtype, "the dtype of B, unless one is given"


def test_takes_memory_for_the_factors_only() -> None:
    """A permutation of the rows as a matrix would be hundreds of times larger than a factor of a vocabulary."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    with Sizes():
        pivot(Factors(torch.randn(500, 2), torch.randn(2, 3)))
    assert largest <= 500 * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_refuses_factors_that_are_not_finite(which: int, bad: float) -> None:
    factors = [torch.ones(4, 2), torch.ones(2, 3)]
    factors[which][1, 1] = bad
    with pytest.raises(ValueError, match="`factors` contain NaN or infinite values"):
        pivot(Factors(*factors))


def test_refuses_a_product_that_overflows() -> None:
    with pytest.raises(ValueError, match=r"the pivot form overflows torch.float16; scale the weight down"):
        pivot(Factors(torch.full((4, 1), 300.0), torch.full((1, 3), 300.0)), dtype=torch.float16)


def test_refuses_the_gram_of_another_weight() -> None:
    with pytest.raises(ValueError, match=r"`gram` must have shape \(3, 3\), or \(3,\) for a diagonal, got \(4,\)"):
        pivot(Factors(torch.ones(4, 1), torch.ones(1, 3)), torch.ones(4), torch.bfloat16)
