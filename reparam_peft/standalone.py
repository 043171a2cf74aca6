"""From a PEFT model to a plain transformers model with factorised layers."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import CheckpointConfig, CheckpointLoader, mark
from .layer import ReparamLayer
from .products import FactorizedModule


def standalone_model(model: nn.Module) -> PreTrainedModel:
    """A transformers model as it computes with its active adapter, without any of PEFT's modules.

    Args:
        model: with `ReparamLayer`s; stays as it is. Its tensors are shared, not copied.

    Raises:
        TypeError: not a transformers model, or it holds modules of other PEFT methods.
        ValueError: an adapter is merged or was never loaded, several are active, or none is and W is gone.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"a standalone model is a transformers model, and a {type(model).__name__} is none; keep the adapter.")
    # A copy of everything but the tensors, with PEFT's modules replaced wherever they stand; tied parameters stay tied.
    memo: dict[int, Any] = {id(tensor): _sharing(tensor) for tensor in chain(model.parameters(), model.buffers())}
    wrappers = [(name, module) for name, module in model.named_modules() if _is_wrapper(module)]
    for name, module in reversed(wrappers):  # what is inside of others first
        plain = _factorized(name, module) if isinstance(module, ReparamLayer) else _unwrapped(name, module)
        memo[id(module)] = plain.train(model.training) if _is_factorized(plain) else copy.deepcopy(plain, memo)
    plain = copy.deepcopy(model, memo)
    vars(plain).pop("peft_config", None)
    layers = {
        name: {"rank": module.rank, "form": module.form, "bias": module.bias is not None}
        for name, module in plain.named_modules()
        if _is_factorized(module)
    }
    if not layers:
        raise ValueError("no layer has factors in the active adapter, so that the model is a dense one; use `unload`.")
    plain.config.quantization_config = CheckpointConfig(layers)
    plain.hf_quantizer = CheckpointLoader(plain.config.quantization_config)
    return plain


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _is_factorized(module: nn.Module) -> bool:
    return isinstance(module, FactorizedModule)


def _unwrapped(name: str, module: nn.Module) -> nn.Module:
    """The module that a wrapper of PEFT's computes with."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [adapter for adapter in module.active_adapters if adapter in module.modules_to_save]
        return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
    raise TypeError(f"{name}: a {type(module).__name__} of another PEFT method has no standalone form; merge it first.")


def _factorized(name: str, layer: ReparamLayer) -> nn.Module:
    """What computes the same as a layer of ours, and shares its tensors."""
    if layer.merged:
        raise ValueError(f"{name}: adapter {layer.merged_adapters} is merged; call `unmerge_adapter` first.")
    layer.check_loaded()
    active = [adapter for adapter in layer.active_adapters if adapter in layer.reparam_factors]
    layer.check_active(active)
    if len(active) > 1:
        raise ValueError(f"{name}: adapters {active} are active; activate one of them with `set_adapter`.")
    if layer.disable_adapters or not active:
        return layer.base_layer
    factors = layer.reparam_factors[active[0]]
    bias = getattr(layer.base_layer, "bias", None) if factors.bias is None else factors.bias
    like = {"device": torch.device("meta"), "dtype": layer.base_dtype}
    module = layer.kind.factorized(layer.base_layer, layer.r[active[0]], factors.form, bias is not None, **like)
    module.set_factors(factors.stored)
    if bias is not None:
        module.set_bias(bias)
    return mark(module)


def _sharing(tensor: Tensor) -> Tensor:
    """The same numbers in a tensor of its own, trainable where it is a parameter of a floating dtype."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.data, requires_grad=tensor.is_floating_point())
