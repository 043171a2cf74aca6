"""The product of one matrix: its form, its rounding, its bias, and what its directions are predicted to cost."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import relative_error

from reparam_peft import ReparamConfig
from reparam_peft.compression.factorizing import Factorizer
from reparam_peft.compression.weighing import Weighing
from reparam_peft.numerics.decompositions import factorize
from reparam_peft.numerics.pivoting import PivotFactors
from reparam_peft.numerics.storage import Storage

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(10, 6, generator=GENERATOR)
X = torch.randn(50, 6, generator=GENERATOR, dtype=torch.float64) + 1
GRAM, MEAN = X.T.cov(correction=0), X.mean(0)
FISHER = torch.eye(10, dtype=torch.float64) * torch.arange(1, 11)
FACTORS, PIVOT = Storage(10, 6), Storage(10, 6, "pivot")
WEIGHING = Weighing(GRAM, FISHER, GRAM, FISHER, loss_scale=2.0, mean=MEAN)


def factorizer(**options: object) -> Factorizer:
    """Of a config with its choices resolved."""
    return Factorizer.of(ReparamConfig(**{"method": "whitened", "allocation": "loss", "form": "factors", **options}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_rounded_once_to_the_stored_dtype(dtype: torch.dtype) -> None:
    product = factorizer().product(W, 3, dtype, WEIGHING, None, FACTORS)
    exact = factorize(W, 3, GRAM, FISHER)
    assert all(torch.equal(ours, theirs.to(dtype)) for ours, theirs in zip(product.factors, exact, strict=True))
    assert (product.rank, product.bias, product.feature_mean) == (3, None, None)


def test_the_pivot_form_is_the_same_matrix() -> None:
    pivots = factorizer().product(W, 3, torch.float32, WEIGHING, None, PIVOT).factors
    assert isinstance(pivots, PivotFactors)
    (A, B), plain = pivots.factors(), factorizer().product(W, 3, torch.float32, WEIGHING, None, FACTORS).factors
    assert relative_error(A @ B, plain.A @ plain.B) < 1e-5


@pytest.mark.parametrize("ceiling", [None, 0.9])
def test_a_moved_bias_keeps_the_mean_of_the_outputs(ceiling: float | None) -> None:
    output_mean = W.double() @ MEAN + 0.5
    product = factorizer(ceiling=ceiling).product(W, 3, torch.float32, WEIGHING, output_mean, FACTORS)
    A, B = product.factors
    assert relative_error(A @ (B @ MEAN.float()) + product.bias, output_mean) < 1e-5
    if ceiling is None:
        assert product.feature_mean is None
    else:
        assert relative_error(product.feature_mean, B.double() @ MEAN) < 1e-5, "kept for lower ranks"


def test_random_factors_are_those_of_the_global_generator() -> None:
    random = factorizer(init_weights=False)
    products = []
    for _ in range(2):
        torch.manual_seed(0)
        products.append(random.product(W, 3, torch.float32, WEIGHING, None, FACTORS).factors)
    assert all(torch.equal(one, two) for one, two in zip(*products, strict=True))
    assert relative_error(products[0].A @ products[0].B, W) > 0.5


def test_losses_are_in_the_scale_of_the_statistics() -> None:
    q = factorizer().losses(W, WEIGHING)
    A, B = factorize(W, 3, GRAM, FISHER)
    E = W.double() - (A @ B).double()
    assert float(q[3:].sum()) == pytest.approx(float(torch.trace(FISHER @ E @ GRAM @ E.T)) / 2 * 2.0, rel=1e-3)


def test_losses_need_gradients() -> None:
    with pytest.raises(ValueError, match="predicted by gradients"):
        factorizer().losses(W, Weighing(GRAM, None, GRAM, None, 1.0, MEAN))


def test_a_config_that_is_not_resolved_is_refused() -> None:
    with pytest.raises(ValueError, match="method"):
        Factorizer.of(ReparamConfig(form="factors"))
