"""The trained autoencoder against the closed form, which is the optimum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import PROPERTY, activation_gram, matrices_and_ranks, matrix_with, metrics, spectrum
from support.tolerances import TOLERANCE, assert_close
from torch import Tensor

from reparam_peft.numerics.autoencoder import STEPS, train_autoencoder
from reparam_peft.numerics.decompositions import Factors, factorize, random_factors
from reparam_peft.numerics.metrics import shrink

FEW = settings(PROPERTY, max_examples=25)


def dense(metric: Tensor | None, size: int) -> Tensor:
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(metric) if metric.ndim == 1 else metric


def loss(weight: Tensor, factors: Factors, gram: Tensor, output_gram: Tensor | None = None) -> float:
    """‖F^½ (W − A B) G^½‖²_F."""
    error = weight.double() - factors.A.double() @ factors.B.double()
    F, G = dense(output_gram, weight.shape[0]), dense(gram, weight.shape[1])
    return float(((F @ error) * (error @ G)).sum())


def shrunk(size: int, amount: float, seed: int = 0) -> Tensor:
    """A Gram of activations as `compress` weighs errors with."""
    return shrink(activation_gram(size, seed), amount)


OUTPUTS = {
    "no metric": lambda size: None,
    "full": lambda size: shrunk(size, 0.1, seed=5),
    "diagonal": lambda size: shrunk(size, 0.1, seed=5).diagonal().clone(),
}


@pytest.mark.parametrize(("output", "rank", "steps"), [*((output, 4, STEPS) for output in OUTPUTS), ("full", 16, 1000)])
@pytest.mark.parametrize("start", ["the SVD", "random factors"])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)], ids=str)
def test_reaches_the_whitened_optimum(shape: tuple[int, int], start: str, output: str, rank: int, steps: int) -> None:
    weight = matrix_with(spectrum("polynomial", min(shape)) ** 0.3, *shape).float()
    gram, output_gram = shrunk(shape[1], 0.01), OUTPUTS[output](shape[0])
    assert float(torch.linalg.cond(gram)) > 1e3
    torch.manual_seed(0)
    factors = random_factors(weight, rank) if start == "random factors" else None
    trained = train_autoencoder(weight, rank, gram, output_gram, factors, steps)
    least = loss(weight, factorize(weight, rank, gram, output_gram), gram, output_gram)
    before = loss(weight, factors or factorize(weight, rank), gram, output_gram)
    assert before > 10 * least, "there is something to be learned"
    assert loss(weight, trained, gram, output_gram) <= 1.01 * least


@FEW
@given(matrices_and_ranks(dtypes=(torch.float64,), most=12), st.data())
def test_is_never_worse_than_its_start_nor_better_than_the_optimum(case: tuple[Tensor, int], data: st.DataObject) -> None:
    weight, rank = case
    gram = data.draw(metrics(weight.shape[1]))
    output_gram = data.draw(st.none() | metrics(weight.shape[0]))
    torch.manual_seed(0)
    start = data.draw(st.sampled_from([None, random_factors(weight, rank), factorize(weight, rank, gram, output_gram)]))
    trained = train_autoencoder(weight, rank, gram, output_gram, start, steps=data.draw(st.sampled_from([1, 3, 20])))
    assert all(torch.isfinite(factor).all() for factor in trained)
    zero = Factors(torch.zeros_like(trained.A), torch.zeros_like(trained.B))
    slack = TOLERANCE[torch.float64] * loss(weight, zero, gram, output_gram)
    got = loss(weight, trained, gram, output_gram)
    assert got <= loss(weight, start or factorize(weight, rank), gram, output_gram) * (1 + 1e-9) + slack
    assert got >= loss(weight, factorize(weight, rank, gram, output_gram), gram, output_gram) * (1 - 1e-5) - slack


def test_a_descent_that_fails_gives_its_start_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(optimizer: torch.optim.Optimizer, closure: object) -> None:
        with torch.no_grad():
            for factor in optimizer.param_groups[0]["params"]:
                factor.mul_(-3)

    monkeypatch.setattr(torch.optim.LBFGS, "step", worse)
    weight, gram = matrix_with(spectrum("polynomial", 6), 6, 8), activation_gram(8)
    start = factorize(weight, 2)
    for got, expected in zip(train_autoencoder(weight, 2, gram, start=start), start, strict=True):
        assert_close(got / got.norm(), expected / expected.norm())
    assert loss(weight, train_autoencoder(weight, 2, gram), gram) == pytest.approx(loss(weight, start, gram))


@FEW
@given(matrices_and_ranks(most=10), st.sampled_from(["full", "diagonal"]))
def test_keeps_shape_and_dtype_and_changes_nothing_else(case: tuple[Tensor, int], kind: str) -> None:
    weight, rank = case
    gram = activation_gram(weight.shape[1])
    gram = gram if kind == "full" else gram.diagonal().clone()
    torch.manual_seed(0)
    start = random_factors(weight, rank)
    before, generator = [tensor.clone() for tensor in (weight, gram, *start)], torch.get_rng_state()
    with torch.no_grad():  # as a caller may have it
        A, B = train_autoencoder(weight, rank, gram, start=start, steps=5)
    assert (A.shape, B.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
    assert A.dtype == B.dtype == weight.dtype
    assert not A.requires_grad
    assert not B.requires_grad
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert all(torch.equal(now, old) for now, old in zip((weight, gram, *start), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_the_scale_of_the_weight_does_not_matter(scale: float) -> None:
    weight, gram = matrix_with(spectrum("polynomial", 10), 10, 14), activation_gram(14)
    losses = [loss(weight, train_autoencoder(weight, 3, gram), gram)]
    scaled = train_autoencoder(weight * scale, 3, gram)
    losses.append(loss(weight, Factors(scaled.A / scale, scaled.B), gram))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert float(scaled.A.norm()) == pytest.approx(float(scaled.B.norm()), rel=1), "of like size"


def test_refuses_what_factorize_refuses() -> None:
    weight, gram = torch.ones(4, 5), torch.eye(5)
    for arguments, message in (
        ((torch.full((4, 5), float("nan")), 2, gram), "`weight` contains NaN"),
        ((weight, 5, gram), r"`rank` must be in \[1, 4\]"),
        ((weight, 2, torch.eye(4)), r"`gram` must have shape \(5, 5\)"),
        ((weight, 2, gram, torch.eye(5)), r"`output_gram` must have shape \(4, 4\)"),
        ((weight, 2, gram, -torch.ones(4)), "`output_gram` must be positive semidefinite"),
    ):
        with pytest.raises(ValueError, match=message):
            train_autoencoder(*arguments)
