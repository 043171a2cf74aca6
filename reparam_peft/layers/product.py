"""A product with the bias that goes with it, its tensors in order, and memory for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..numerics.decompositions import Corrected, Factors, Whole
from ..numerics.pivoting import PivotFactors
from ..numerics.storage import Storage, scale_shape
from .masks import spread

Stored: TypeAlias = Factors | PivotFactors | Whole | Corrected  # in the forms "factors", "pivot", "dense" and "corrected"
NONE: Mapping[str, Tensor] = MappingProxyType({})


class Product(NamedTuple):
    """What a layer computes in place of W x + b.

    Attributes:
        factors: of a matrix W' ≈ W, in either form; or, of rows and columns that are left, the matrix itself.
        bias: shape (out,), where the layer's own is replaced; else None.
        feature_mean: E[B x], shape (r,), where the product serves lower ranks too and the bias depends on the rank; else None.
        rows: indices of the rows of W that are left, int64, ascending, where some are left out, also of the bias; else None.
        columns: indices of the columns of W that are left, likewise.
        scales: of those matrices of `factors` whose numbers are to be stored in few bits, by name and in the shape of
            `numerics.storage.scale_shape`: the numbers are on the grid of their scales.
    """

    factors: Stored
    bias: Tensor | None = None
    feature_mean: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    scales: Mapping[str, Tensor] = NONE

    @property
    def rank(self) -> int:
        """r; of a matrix that is stored as it is, min(out, in)."""
        if isinstance(self.factors, Whole):
            return min(self.factors.W.shape)
        return len(self.factors.P if isinstance(self.factors, PivotFactors) else self.factors.B)


def whole_matrix(product: Product, shape: tuple[int, int]) -> Tensor:
    """W' (out, in) in float32 or wider, with zero rows and columns where some are left out.

    >>> whole_matrix(Product(Whole(torch.ones(1, 2)), rows=torch.tensor([1])), (2, 2))
    tensor([[0., 0.],
            [1., 1.]])
    """
    factors = product.factors if isinstance(product.factors, Factors) else product.factors.factors()
    A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors)
    return _spread(_spread(A @ B, product.rows, 0, shape[0]), product.columns, 1, shape[1])


def whole_bias(product: Product, out_features: int) -> Tensor | None:
    """The bias (out,), zero where rows are left out; None where there is none."""
    return None if product.bias is None else _spread(product.bias, product.rows, 0, out_features)


def _spread(values: Tensor, indices: Tensor | None, dim: int, size: int) -> Tensor:
    """Values at these indices of a dimension of a size, and zero elsewhere; without indices the values themselves."""
    if indices is None:
        return values
    is_kept = torch.zeros(size, dtype=torch.bool, device=values.device)
    is_kept[indices.to(values.device)] = True
    return spread(values, is_kept, dim)


def tensors_of(product: Product) -> list[Tensor]:
    """The tensors of a product, in order."""
    optional = (product.bias, product.feature_mean, product.rows, product.columns)
    scales = [product.scales[name] for name in type(product.factors)._fields if name in product.scales]
    return [*product.factors, *scales, *(tensor for tensor in optional if tensor is not None)]


def product_of(tensors: Sequence[Tensor], rank: int, storage: Storage) -> Product:
    """The product that has these tensors: the inverse of `tensors_of`.

    Args:
        tensors: in order.
        rank: r.
        storage: which says the form, and whether rows or columns are left out.

    >>> A, B, bias = torch.ones(3, 1), torch.ones(1, 2), torch.zeros(3)
    >>> product_of(tensors_of(Product(Factors(A, B), bias)), 1, Storage(3, 2, bias=True)).bias is bias
    True
    """
    class_of_form: dict[str, type[Stored]] = {
        "factors": Factors,
        "pivot": PivotFactors,
        "dense": Whole,
        "corrected": Corrected,
    }
    made = class_of_form[storage.form_at(rank)]
    count, widths = len(made._fields), storage.widths(rank)
    scales = dict(zip(widths, tensors[count:], strict=False))
    rest, (out_features, in_features) = list(tensors[count + len(widths) :]), storage.whole_shape
    columns = rest.pop() if in_features > storage.in_features else None
    rows = rest.pop() if out_features > storage.out_features else None
    bias, feature_mean = (*rest, None, None)[:2]
    return Product(made(*tensors[:count]), bias, feature_mean, rows, columns, scales)


def named_tensors(products: Mapping[str, Product]) -> dict[str, Tensor]:
    """The tensors of products by names under which a file can hold them, of which each begins with that of its product."""
    return {f"{name}/{i}": tensor for name, product in products.items() for i, tensor in enumerate(tensors_of(product))}


def named_product(tensors: Mapping[str, Tensor], name: str, rank: int, storage: Storage) -> Product:
    """One of the products of `named_tensors`.

    Args:
        tensors: of any products, and others.
        name: of the product.
        rank: r.
        storage: as for `product_of`.

    >>> product = Product(Factors(torch.ones(3, 1), torch.ones(1, 2)))
    >>> named_product(named_tensors({"a": product}), "a", 1, Storage(3, 2)).factors.A is product.factors.A
    True
    """
    count = sum(key.rpartition("/")[0] == name for key in tensors)
    return product_of([tensors[f"{name}/{i}"] for i in range(count)], rank, storage)


def empty_product(rank: int, storage: Storage, dtype: torch.dtype, nested: bool) -> list[Tensor]:
    """Memory on the CPU for what `tensors_of` gives: tensors of its shapes and dtypes with arbitrary content.

    Args:
        rank: r.
        storage: shape of the matrix, form and bits of the product, whether it has a bias, and whether rows or columns are left
            out.
        dtype: of all but the indices, the scales, and the numbers on their grids, which are float32.
        nested: whether lower ranks are served too, so that a bias comes with the mean of the features.

    >>> [tuple(tensor.shape) for tensor in empty_product(2, Storage(5, 3, "pivot", bias=True), torch.float32, nested=True)]
    [(2, 3), (3, 2), (2,), (5,), (2,)]
    """
    form, (out_features, in_features) = storage.form_at(rank), (storage.out_features, storage.in_features)
    shapes, widths = storage.matrices(rank), storage.widths(rank)
    tensors = [torch.empty(shape, dtype=torch.float32 if name in widths else dtype) for name, shape in shapes.items()]
    if form == "pivot":
        tensors.append(torch.empty(rank, dtype=torch.int64))
    for name, bits in widths.items():
        tensors.append(torch.empty(scale_shape(*shapes[name], bits), dtype=torch.float32))
    if storage.bias:
        tensors.append(torch.empty(out_features, dtype=dtype))
        if nested and form != "dense":  # which serves no lower rank
            tensors.append(torch.empty(rank, dtype=dtype))
    left = zip(storage.whole_shape, (out_features, in_features), strict=True)
    return tensors + [torch.empty(size, dtype=torch.int64) for whole, size in left if whole > size]
