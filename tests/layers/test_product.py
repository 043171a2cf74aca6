"""Products as lists of tensors, and memory for them."""

from __future__ import annotations

import pytest
import torch

from reparam_peft.layers.product import Product, empty_product, product_of, tensors_of
from reparam_peft.numerics.decompositions import Factors, Whole, factorize
from reparam_peft.numerics.pivoting import PivotFactors, pivot
from reparam_peft.numerics.storage import Storage

forms = pytest.mark.parametrize("form", ["factors", "pivot"])
extras = pytest.mark.parametrize(("bias", "nested"), [(False, False), (True, False), (True, True)])
wholes = pytest.mark.parametrize("whole", [None, (9, 5), (7, 8), (9, 8)], ids=["whole", "rows", "columns", "both"])


def product(storage: Storage, rank: int, nested: bool) -> Product:
    W = torch.randn(7, 5, dtype=torch.float64)
    stored = {"factors": lambda: factorize(W, rank), "pivot": lambda: pivot(factorize(W, rank)), "dense": lambda: Whole(W)}
    form, (out_features, in_features) = storage.form_at(rank), storage.whole_shape
    return Product(
        stored[form](),
        torch.randn(7, dtype=torch.float64) if storage.bias else None,
        torch.randn(rank, dtype=torch.float64) if storage.bias and nested and form != "dense" else None,
        torch.randperm(out_features)[:7].sort().values if out_features > 7 else None,
        torch.randperm(in_features)[:5].sort().values if in_features > 5 else None,
    )


@forms
@extras
@wholes
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_product_is_made_of_its_tensors_again_and_there_is_memory_for_them(
    form: str, rank: int, bias: bool, nested: bool, whole: tuple[int, int] | None
) -> None:
    storage = Storage(7, 5, form, bias, whole)
    expected = product(storage, rank, nested)
    assert expected.rank == rank
    got = product_of(tensors_of(expected), rank, storage)
    as_one = whole is not None and rank == 5
    assert type(got.factors) is (Whole if as_one else PivotFactors if form == "pivot" else Factors)
    assert all(tensor is other for tensor, other in zip(tensors_of(got), tensors_of(expected), strict=True))
    assert [part is None for part in got] == [part is None for part in expected]
    memory = empty_product(rank, storage, torch.float64, nested)
    assert [(t.shape, t.dtype) for t in memory] == [(t.shape, t.dtype) for t in tensors_of(expected)]


def test_without_a_bias_there_is_no_mean_either() -> None:
    assert len(empty_product(2, Storage(7, 5), torch.float32, nested=True)) == 2


@pytest.mark.parametrize("form", ["factors", "pivot", "dense", "corrected"])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_in_few_bits_have_room_and_come_back_whole(form: str, bits: int) -> None:
    storage = Storage(40, 24, form, bias=True, bits=bits, correction_bits=8)
    rank = 24 if form == "dense" else 17
    tensors = empty_product(rank, storage, torch.float32, nested=False)
    product = product_of(tensors, rank, storage)
    assert product.scales.keys() == storage.widths(rank).keys()
    assert [id(tensor) for tensor in tensors_of(product)] == [id(tensor) for tensor in tensors]
    assert product.rank == rank
