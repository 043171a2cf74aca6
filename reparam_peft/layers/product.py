"""A product with the bias that goes with it, its tensors in order, and memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.decompositions import Factors
from ..numerics.pivoting import PivotFactors
from ..numerics.storage import Storage


class Product(NamedTuple):
    """What a layer computes in place of W x + b.

    Attributes:
        factors: of a matrix W' ≈ W, in either form.
        bias: shape (out,), where the layer's own is replaced; else None.
        feature_mean: E[B x], shape (r,), where the product serves lower ranks too and the bias depends on the rank; else None.
    """

    factors: Factors | PivotFactors
    bias: Tensor | None = None
    feature_mean: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.factors.P if isinstance(self.factors, PivotFactors) else self.factors.B)


def tensors_of(product: Product) -> list[Tensor]:
    """The tensors of a product, in order."""
    return [tensor for tensor in (*product.factors, product.bias, product.feature_mean) if tensor is not None]


def product_of(tensors: Sequence[Tensor], form: str) -> Product:
    """The product in a form that has these tensors: the inverse of `tensors_of`.

    >>> A, B, bias = torch.ones(3, 1), torch.ones(1, 2), torch.zeros(3)
    >>> product_of(tensors_of(Product(Factors(A, B), bias)), "factors").bias is bias
    True
    """
    factors: Factors | PivotFactors
    if form == "pivot":
        P, K, pivots, *rest = tensors
        factors = PivotFactors(P, K, pivots)
    else:
        A, B, *rest = tensors
        factors = Factors(A, B)
    return Product(factors, *rest)


def empty_product(rank: int, storage: Storage, dtype: torch.dtype, nested: bool) -> list[Tensor]:
    """Memory on the CPU for what `tensors_of` gives: tensors of its shapes and dtypes with arbitrary content.

    Args:
        rank: r.
        storage: shape of the matrix, form of the product, and whether it has a bias.
        dtype: of all but the indices of pivots.
        nested: whether lower ranks are served too, so that a bias comes with the mean of the features.

    >>> [tuple(tensor.shape) for tensor in empty_product(2, Storage(5, 3, "pivot", bias=True), torch.float32, nested=True)]
    [(2, 3), (3, 2), (2,), (5,), (2,)]
    """
    if storage.form == "pivot":
        P = torch.empty(rank, storage.in_features, dtype=dtype)
        K = torch.empty(storage.out_features - rank, rank, dtype=dtype)
        tensors = [P, K, torch.empty(rank, dtype=torch.int64)]
    else:
        A = torch.empty(storage.out_features, rank, dtype=dtype)
        tensors = [A, torch.empty(rank, storage.in_features, dtype=dtype)]
    if storage.bias:
        tensors.append(torch.empty(storage.out_features, dtype=dtype))
        if nested:
            tensors.append(torch.empty(rank, dtype=dtype))
    return tensors
