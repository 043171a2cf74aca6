"""A further adapter that starts as a copy of one that is there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config.reparam_config import ReparamConfig
from .layer import ReparamLayer, reparam_layers
from .targets import Target


def adapter_to_copy(model: nn.Module, configs: Mapping[str, ReparamConfig], adapter_name: str) -> str | None:
    """The adapter that a new one is to be a copy of: one whose resolved config it was given, or an equal one; else None.

    The frozen reference of a trainer is made so: `model.add_adapter("ref", model.peft_config["default"])`. A config out of a
    checkpoint, whose weights a loader is about to bring, is that of a copy only where it is the very object of the other.

    Args:
        model: that holds the adapters.
        configs: of all adapters of this method, the new one's among them.
        adapter_name: the new adapter.
    """
    config = configs[adapter_name]
    others = {name: other for name, other in configs.items() if name != adapter_name and other.rank_pattern}
    same = [name for name, other in others.items() if other is config]
    if not same and not config.loading:
        same = [name for name, other in others.items() if _fields(other) == _fields(config)]
    whole = [name for name in same if not any(name in layer.arrivals.awaited for _, layer in reparam_layers(model))]
    return whole[0] if whole else None


def _fields(config: ReparamConfig) -> dict[str, Any]:
    """What makes two adapters alike: all but whether they are trained."""
    return {name: value for name, value in config.to_dict().items() if name != "inference_mode"}


def copied(targets: Mapping[str, Target], source: str) -> dict[str, Target] | None:
    """The targets, each with a copy of an adapter's factorised module; changes nothing in the model.

    The mask and the order of the pivot form, the bias, and the dtype in which the factors train are part of the copy.

    Args:
        targets: of the new adapter.
        source: the adapter that is copied.

    Returns:
        None where rank, form, size, bias or bits of a target are not those of the source.
    """
    done = {}
    for name, target in targets.items():
        layer = target.module
        if target.rank is None:
            done[name] = target
            continue
        if not isinstance(layer, ReparamLayer) or source not in layer.reparam_factors:
            return None
        module = layer.factorized(source)
        storage = target.storage
        made = (module.rank, module.form, module.size, module.bias is not None, dict(module.widths))
        if made != (target.rank, target.form, storage.size, storage.bias, dict(target.widths)):
            return None
        done[name] = replace(target, copied=copy.deepcopy(module, {id(layer.base_layer): layer.base_layer}))
    return done


def copy_saved_modules(model: nn.Module, source: str, adapter_name: str) -> None:
    """Give the modules that an adapter saves whole the content of another adapter's; PEFT starts them from the base model's."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {source, adapter_name} <= module.modules_to_save.keys():
            module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
