"""What has to hold before adapters are merged, disabled or taken away."""

from __future__ import annotations

from torch import nn

from ..runtime.modules import naming, parameter_owners
from .layer import W_IS_GONE, reparam_layers


def check_mergeable(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Raise `ValueError` before the first layer is merged where a later one could not be.

    Args:
        model: that holds the adapters.
        adapter_names: which are to be merged; None: the active ones.
        safe_merge: whether the results are to be finite.
    """
    owners = parameter_owners(model)
    for name, layer in reparam_layers(model):
        names = layer.active_adapters if adapter_names is None else adapter_names
        new = [n for n in names if n in layer.reparam_factors and n not in layer.merged_adapters]
        if layer.base_weight_dropped and not new and not layer.merged:
            raise ValueError(f"{name}: none of the adapters {names} has factors for this layer, and {W_IS_GONE}.")
        shared = [] if layer.base_weight_dropped else owners[id(layer.base_layer.weight)]
        if len(shared) > 1:
            raise ValueError(
                f"{name}: the weight is shared ({', '.join(shared)}), so that merging would change the other too. Untie it "
                "before factorising."
            )
        if new:
            with naming(name):
                layer.check_mergeable(new, safe_merge)


def check_base_weights(model: nn.Module, what: str) -> None:
    """Raise `ValueError` where a layer has lost its W, with what cannot be done without it."""
    for name, layer in reparam_layers(model):
        with naming(name):
            layer.check_base_weight(what)
