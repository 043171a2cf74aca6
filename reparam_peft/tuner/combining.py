"""Several adapters at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def combined(products: list[Tensor], base: Callable[[], Tensor]) -> Tensor:
    """base + Σ (product − base); of a single product, that product to the bit.

    >>> combined([Tensor([3.0]), Tensor([4.0])], lambda: Tensor([1.0]))
    tensor([6.])
    """
    if len(products) == 1:
        return products[0]
    original = base()
    return sum((product - original for product in products), start=original)


def alone(layer: Any) -> nn.Module | None:
    """What computes in a layer of ours, where it is one module: the base layer, or the product of one adapter that is there."""
    if layer.merged or layer.disable_adapters:
        return None if layer.merged and layer.disable_adapters else layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.reparam_factors]
    return layer.factorized(active[0]) if len(active) == 1 and not layer.arrivals.awaited else None
