"""A product with the bias that goes with it, and its tensors in order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..numerics.decompositions import Factors
from ..numerics.pivoting import PivotFactors


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


def tensors_of(product: Product) -> list[Tensor]:
    """The tensors of a product, in order."""
    return [tensor for tensor in (*product.factors, product.bias, product.feature_mean) if tensor is not None]


def product_of(tensors: list[Tensor], stored_as: str) -> Product:
    """The product in a form that has these tensors: the inverse of `tensors_of`."""
    form = PivotFactors if stored_as == "pivot" else Factors
    count = len(form._fields)
    return Product(form(*tensors[:count]), *tensors[count:])
