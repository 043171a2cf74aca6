"""Products as lists of tensors, and memory for them."""

from __future__ import annotations

import pytest
import torch

from reparam_peft.layers.product import Product, empty_product, product_of, tensors_of
from reparam_peft.numerics.decompositions import factorize
from reparam_peft.numerics.pivoting import PivotFactors, pivot
from reparam_peft.numerics.storage import Storage

forms = pytest.mark.parametrize("form", ["factors", "pivot"])
extras = pytest.mark.parametrize(("bias", "nested"), [(False, False), (True, False), (True, True)])


def product(form: str, rank: int, bias: bool, nested: bool) -> Product:
    factors = factorize(torch.randn(7, 5, dtype=torch.float64), rank)
    return Product(
        pivot(factors) if form == "pivot" else factors,
        torch.randn(7, dtype=torch.float64) if bias else None,
        torch.randn(rank, dtype=torch.float64) if nested else None,
    )


@forms
@extras
def test_a_product_is_made_of_its_tensors_again(form: str, bias: bool, nested: bool) -> None:
    expected = product(form, 3, bias, nested)
    got = product_of(tensors_of(expected), form)
    assert isinstance(got.factors, PivotFactors) == (form == "pivot")
    assert all(tensor is other for tensor, other in zip(tensors_of(got), tensors_of(expected), strict=True))
    assert (got.bias is None, got.feature_mean is None) == (not bias, not nested)


@forms
@extras
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_memory_has_the_shapes_and_dtypes_of_the_product(form: str, rank: int, bias: bool, nested: bool) -> None:
    expected = tensors_of(product(form, rank, bias, nested))
    memory = empty_product(rank, Storage(7, 5, form, bias), torch.float64, nested)
    assert [(t.shape, t.dtype) for t in memory] == [(t.shape, t.dtype) for t in expected]


def test_without_a_bias_there_is_no_mean_either() -> None:
    assert len(empty_product(2, Storage(7, 5), torch.float32, nested=True)) == 2
