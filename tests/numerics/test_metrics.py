"""Metrics against dense matrices: products, roots, pseudo-inverses and shrinkage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import METRICS, PROPERTY, gram_with, metrics
from support.tolerances import TOLERANCE, assert_close
from torch import Tensor

from reparam_peft.numerics.metrics import Metric, check_metric, is_finite, shrink, solve

EXACT = TOLERANCE[torch.float64]
DEFINITE = ("full", "diagonal", "ill-conditioned")


def dense(metric: Tensor) -> Tensor:
    return torch.diag(metric) if metric.ndim == 1 else metric


def some_columns(size: int) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


@st.composite
def sized_metrics(draw: st.DrawFn, kinds: tuple[str, ...] = METRICS) -> Tensor:
    return draw(metrics(draw(st.integers(2, 16)), kinds))


@PROPERTY
@given(sized_metrics())
def test_is_the_matrix_over_its_scale(matrix: Tensor) -> None:
    metric, X = Metric(matrix), some_columns(len(matrix))
    M = dense(matrix)
    assert metric.scaled().shape == matrix.shape
    if not matrix.any():
        assert metric.scale == 0
        assert not metric.times(X).any()
        return
    assert float(dense(metric.scaled()).diagonal().mean()) == pytest.approx(1)
    assert_close(metric.scale * metric.scaled(), matrix)
    assert_close(metric.scale * metric.times(X), M @ X)
    assert_close(metric.norms(X), (X.mT @ M @ X).diagonal())


@pytest.mark.parametrize("size", [3, 200, 384])
@pytest.mark.parametrize("kind", ["full", "diagonal", "singular"])
def test_products_by_blocks_are_whole_products(kind: str, size: int) -> None:
    rows = torch.randn(size // 2 if kind == "singular" else 2 * size, size, generator=torch.Generator().manual_seed(0)).double()
    matrix = rows.square().mean(0) if kind == "diagonal" else rows.mT @ rows
    metric, X = Metric(matrix), some_columns(size)
    quadratic = metric.quadratic(X)
    assert_close(quadratic, X.mT @ metric.times(X))
    assert torch.equal(quadratic, quadratic.mT)
    root = torch.diag(metric.root) if kind == "diagonal" else metric.root
    assert_close(metric.whiten(X), root.mT @ X)


@PROPERTY
@given(sized_metrics())
def test_the_root_is_a_root(matrix: Tensor) -> None:
    metric, X = Metric(matrix), some_columns(len(matrix))
    T = dense(metric.root)
    assert_close(T @ T.mT, dense(metric.scaled()))
    assert_close(metric.whiten(X), T.mT @ X)
    # Whitening makes the metric the identity: |Tᵀ x|² = xᵀ M x.
    assert_close(metric.whiten(X).square().sum(0) * metric.scale, metric.norms(X))


@PROPERTY
@given(sized_metrics(DEFINITE))
def test_unwhitening_undoes_whitening(matrix: Tensor) -> None:
    metric, X = Metric(matrix), some_columns(len(matrix))
    # The root's condition number, at most 1e4 here, multiplies rounding.
    assert_close(metric.unwhiten(metric.whiten(X)), X)
    assert_close(metric.whiten(metric.unwhiten(X)), X)


@PROPERTY
@given(sized_metrics(("few rows", "dead channels", "zero")))
def test_of_a_singular_metric_it_is_the_pseudo_inverse(matrix: Tensor) -> None:
    metric, X = Metric(matrix), some_columns(len(matrix))
    T = dense(metric.root)
    inverse = metric.unwhiten(torch.eye(len(matrix), dtype=torch.float64))
    assert torch.isfinite(inverse).all()
    # Penrose's conditions for Tᵀ, of which the pseudo-inverse is the only solution.
    size = 1 + float(inverse.norm())
    for got, expected in (
        (T.mT @ inverse @ T.mT, T.mT),
        (inverse @ T.mT @ inverse, inverse),
        ((T.mT @ inverse).mT, T.mT @ inverse),
        ((inverse @ T.mT).mT, inverse @ T.mT),
    ):
        assert float((got - expected).norm()) <= 1e-6 * size
    assert_close(metric.unwhiten(X), inverse @ X)


@pytest.mark.parametrize("direction", [1e-4, 1e-10, 1e-13, 1e-18, 0.0])
def test_a_weak_direction_is_inverted_or_absent_and_never_in_between(direction: float) -> None:
    """Below 1e-14 of the largest an eigenvalue cannot be told from rounding."""
    for matrix in (gram_with(torch.tensor([1.0, 0.5, direction], dtype=torch.float64)), torch.tensor([1.0, 0.5, direction])):
        metric = Metric(matrix)
        inverse = metric.unwhiten(torch.eye(3, dtype=torch.float64))
        largest = float(torch.linalg.matrix_norm(inverse, 2))
        root = (direction / metric.scale) ** 0.5
        assert largest == pytest.approx(1 / root, rel=0.2) if direction > 1e-14 else largest < 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_float64_whatever_it_is_given(dtype: torch.dtype) -> None:
    for matrix in (torch.eye(3, dtype=dtype), torch.ones(3, dtype=dtype)):
        metric = Metric(matrix.requires_grad_())
        assert metric.scaled().dtype == metric.root.dtype == torch.float64
        assert not metric.scaled().requires_grad


@PROPERTY
@given(sized_metrics(), st.floats(0, 1))
def test_shrinking_keeps_the_trace_and_moves_to_the_identity(matrix: Tensor, amount: float) -> None:
    before = matrix.clone()
    shrunk = shrink(matrix, amount)
    assert torch.equal(matrix, before)
    mean = dense(matrix).diagonal().mean()
    identity = torch.eye(len(matrix), dtype=torch.float64)
    assert_close(dense(shrunk), (1 - amount) * dense(matrix) + amount * mean * identity)
    assert float(dense(shrunk).diagonal().mean()) == pytest.approx(float(mean))
    if amount > 0 and mean > 0:
        least = float(torch.linalg.eigvalsh(dense(shrunk))[0])
        assert least >= amount * float(mean) * (1 - 1e-6) - 1e-12 * float(dense(matrix).norm())


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_shrinking_by_more_than_all_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match=rf"`amount` must be in \[0, 1\], got {amount}"):
        shrink(torch.ones(3), amount)


NAN = float("nan")
BAD_METRICS = {
    "other size": (torch.eye(4), r"`gram` must have shape \(3, 3\), or \(3,\) for a diagonal, got \(4, 4\)"),
    "other length": (torch.ones(4), r"got \(4,\); it belongs to another weight"),
    "not square": (torch.ones(3, 4), r"got \(3, 4\)"),
    "cube": (torch.ones(3, 3, 3), r"got \(3, 3, 3\)"),
    "NaN": (torch.tensor([1.0, NAN, 1.0]), "`gram` contains NaN or infinite"),
    "NaN off the diagonal": (torch.eye(3).index_fill(0, torch.tensor([1]), NAN), "`gram` contains NaN or infinite"),
    "infinite": (torch.eye(3) / torch.zeros(3, 3), "`gram` contains NaN or infinite"),
    "negative": (torch.tensor([1.0, -1e-3, 1.0]), "`gram` must be positive semidefinite, but has a negative diagonal entry"),
    "negative diagonal": (torch.diag(torch.tensor([1.0, -1.0, 1.0])), "negative diagonal entry"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_refuses(name: str) -> None:
    metric, message = BAD_METRICS[name]
    with pytest.raises(ValueError, match=message):
        check_metric("gram", metric, 3)


@PROPERTY
@given(sized_metrics())
def test_accepts_every_metric_of_the_right_size(matrix: Tensor) -> None:
    check_metric("gram", matrix, len(matrix))


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_equations_of_a_singular_metric_have_the_solution_of_least_norm(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    root, right = (torch.randn(5, n, dtype=torch.float64, generator=generator) for n in (rank, 3))
    metric = 7 * root @ root.mT
    torch.testing.assert_close(solve(metric, right), torch.linalg.pinv(metric, hermitian=True, rtol=1e-9) @ right)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_finite(value: float, dtype: torch.dtype) -> None:
    X = torch.randn(5, 7).to(dtype)
    assert is_finite(X)
    assert is_finite(X[:0])
    X[3, 2] = value
    assert not is_finite(X)
