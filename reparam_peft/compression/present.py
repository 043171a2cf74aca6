"""An adapter as it is: checked, and its targets with their present ranks, before its ranks are lowered."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from ..arguments import check_number
from ..config.checks import STORED
from ..config.few_bits import check_one_shot
from ..config.reparam_config import ReparamConfig
from ..layers.factorized import FactorizedModule
from ..runtime.modules import naming
from ..tuner.layer import ReparamLayer, reparam_layers
from ..tuner.matrices import matrix_storage, unwrapped
from ..tuner.model import ReparamModel, config_of
from ..tuner.targets import Target


def check_model(model: PeftModel, keep: float, adapter_name: str | None, with_data: bool) -> tuple[ReparamModel, str]:
    """The tuner and the name of the adapter; raises where it cannot be truncated."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ReparamModel):
        raise TypeError(
            f"`model` must be a PeftModel of a ReparamConfig, got a {type(model).__name__}; make one with `get_peft_model` or "
            "`compress`, or load one with `PeftModel.from_pretrained`."
        )
    check_number("keep", keep, 0, 1, above=True, meaning=STORED)
    active = list(model.active_adapters)
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"`adapter_name` must be given where several adapters are active, here {active}.")
    adapter_name = adapter_name or active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` must be one of {list(model.peft_config)}, got {adapter_name!r}.")
    check_one_shot(config_of(model, adapter_name), "`retruncate`")
    for name, layer in reparam_layers(model.get_base_model()):
        if layer.merged:
            raise ValueError(f"{name}: adapters {layer.merged_adapters} are merged; call `model.unmerge_adapter()` first.")
        layer.arrivals.accept_arrived()
        if layer.arrivals.awaited:
            raise ValueError(
                f"{name}: the factors of adapter {min(layer.arrivals.awaited)!r} were never loaded; load them with "
                "`PeftModel.from_pretrained` or `load_adapter`."
            )
        if with_data and (active != [adapter_name] or layer.disable_adapters):
            raise ValueError(
                f"`batches` are of use for the one active adapter, and active are {[] if layer.disable_adapters else active}; "
                f"call `model.set_adapter({adapter_name!r})` outside of `disable_adapter()` first, or leave `batches` out."
            )
    return model.base_model, adapter_name


def present_targets(
    model: PeftModel, adapter_name: str, config: ReparamConfig
) -> tuple[dict[str, ReparamLayer], dict[str, Target]]:
    """The factorised layers of an adapter, and all its targets with their ranks; of the former, the module is their B.

    Raises:
        TypeError, ValueError: a module is not as our tuner made it.
    """
    base = model.get_base_model()
    all_layers = dict(reparam_layers(base))
    layers: dict[str, ReparamLayer] = {}
    targets: dict[str, Target] = {}
    for name, rank in config.rank_pattern.items():
        with naming(name):
            layer = all_layers.get(name)
            if layer is None or layer.r.get(adapter_name) != rank:
                raise ValueError(f"it has no factors of rank {rank} of adapter {adapter_name!r}; unwrap or reload the model.")
            factorized = layer.factorized(adapter_name)
            _check_plain(factorized, layer.like(adapter_name).to(factorized.dtype))
            layers[name], targets[name] = layer, Target(factorized.B, rank, matrix_storage(layer, name, config))
    for name in config.dense_modules or ():
        with naming(name):
            dense = base.get_submodule(name)
            targets[name] = Target(dense, None, matrix_storage(unwrapped(dense), name, config))
    return layers, targets


def _check_plain(module: FactorizedModule, expected: FactorizedModule) -> None:
    """Raise `ValueError` where a module differs from one that our tuner makes."""

    def classes(m: nn.Module) -> list[tuple[str, type]]:
        return [(name, type(child)) for name, child in m.named_modules()]

    def shapes(m: nn.Module) -> list[tuple[str, torch.Size, type]]:
        return [(name, parameter.shape, type(parameter)) for name, parameter in m.named_parameters()]

    if classes(module) != classes(expected) or shapes(module) != shapes(expected):
        raise ValueError(
            "its factors are wrapped, quantised or sharded by something else (LoRA on the factors, say), which new factors "
            "would lose; merge, dequantise or unwrap them first."
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError("its factors are on the meta device (offloaded); load the model without offloading.")
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in module.modules()):
        raise ValueError("its factors have hooks, which new factors would lose; remove them first.")
