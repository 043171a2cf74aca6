"""Factors that a loader was to bring and did not."""

from __future__ import annotations

from torch import nn

from ..runtime.modules import naming
from .layer import reparam_layers


def factorize_awaited(model: nn.Module) -> None:
    """Factorise W, in place, where a config out of a checkpoint is used without its weights, so that none of them has arrived.

    Nothing is done where some have arrived, or where there is no W to factorise.
    """
    layers = list(reparam_layers(model))
    awaited = [(name, layer, adapter) for name, layer in layers for adapter in sorted(layer.arrivals.awaited)]
    # Of what has lost neurons nothing says which, until it has arrived.
    has_base = not any(
        layer.base_weight_dropped or layer.base_layer.weight.is_meta or layer.factorized(adapter).size is not None
        for _, layer, adapter in awaited
    )
    if has_base and not any(layer.arrivals.has_arrived(adapter) for _, layer, adapter in awaited):
        for name, layer, adapter in awaited:
            with naming(name):
                layer.factorize_base(adapter)
