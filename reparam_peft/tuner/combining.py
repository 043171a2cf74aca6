"""Several adapters at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def combined(products: list[Tensor], base: Callable[[], Tensor]) -> Tensor:
    """base + Σ (product − base); of a single product, that product to the bit.

    >>> combined([Tensor([3.0]), Tensor([4.0])], lambda: Tensor([1.0]))
    tensor([6.])
    """
    if len(products) == 1:
        return products[0]
    original = base()
    return sum((product - original for product in products), start=original)
