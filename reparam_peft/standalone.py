"""From a PEFT model to a plain transformers model with factorised layers."""

from __future__ import annotations

import copy
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .checkpoint import (
    METHOD,
    CheckpointConfig,
    CheckpointLoader,
    mark,
    mark_unquantized,
    specification_of,
    with_layers_in_config,
)
from .factorized import dequantized, is_quantized, note_dtype
from .layer import ReparamLayer
from .products import FactorizedModule
from .quantization import check_scheme
from .quantization import quantize as quantize_factors

MODULE = "modeling_reparam"


def standalone_model(model: nn.Module, quantize: str | None = None) -> PreTrainedModel:
    """A transformers model as it computes with its active adapter, without any of PEFT's modules.

    Args:
        model: with `ReparamLayer`s; stays as it is. Its tensors are shared, not copied.
        quantize: "int8" or "int4", for the matrices of factors; None: as they are.

    Raises:
        TypeError: not a transformers model, or it holds modules of other PEFT methods.
        ValueError: an adapter is merged or was never loaded, several are active, or none is and W is gone.
        ImportError: the library of `quantize` is missing.
    """
    check_scheme(quantize)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"a standalone model is a transformers model, and a {type(model).__name__} is none; keep the adapter.")
    # A copy of everything but the tensors, with PEFT's modules replaced wherever they stand; tied parameters stay tied.
    memo: dict[int, Any] = {id(tensor): _sharing(tensor) for tensor in chain(model.parameters(), model.buffers())}
    note_dtype(model)
    for name, module in reversed(list(model.named_modules())):  # what is inside of others first
        if is_quantized(module):
            memo[id(module)] = dequantized(module)
        if not _is_wrapper(module):
            continue
        plain = _factorized(name, module) if isinstance(module, ReparamLayer) else _unwrapped(name, module)
        factorized = isinstance(plain, FactorizedModule)
        memo[id(module)] = plain.train(model.training) if factorized else copy.deepcopy(plain, memo)
    plain = copy.deepcopy(model, memo)
    vars(plain).pop("peft_config", None)
    layers = {name: specification_of(module) for name, module in plain.named_modules() if isinstance(module, FactorizedModule)}
    if not layers:
        raise ValueError("no layer has factors in the active adapter, so that the model is a dense one; use `unload`.")
    mark_unquantized(plain)
    plain.config.quantization_config = CheckpointConfig(layers, quantization=quantize)
    plain.hf_quantizer = CheckpointLoader(plain.config.quantization_config)
    if quantize is not None:
        quantize_factors(plain, quantize)
        plain.is_quantized, plain.quantization_method = True, METHOD
    return plain


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


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


def save_self_contained(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a standalone model with the code that it needs, for `from_pretrained(…, trust_remote_code=True)`.

    Args:
        model: what `to_standalone()` returns.
        folder: with `modeling_reparam.py`, a reader that imports torch and transformers only.

    Raises:
        ValueError: the model has no factorised layers, or quantised ones.
    """
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, CheckpointConfig):
        raise ValueError("only a standalone model can be saved with its code; call `to_standalone` first.")
    if described.quantization is not None:
        raise ValueError("the code of self-contained checkpoints does not read quantised factors; leave one of the two out.")
    plain = with_layers_in_config(model, described)
    del plain.hf_quantizer
    classes = {auto: made.__name__ for auto, made in _auto_classes(model).items()}
    plain.config.auto_map = {auto: f"{MODULE}.Reparam{name}" for auto, name in classes.items()}
    plain.save_pretrained(folder)
    text = resources.files(__package__).joinpath(f"{MODULE}.py").read_text(encoding="utf-8")
    for name in sorted(set(classes.values())):
        text += f"\n\nclass Reparam{name}(WithFactors, transformers.{name}):\n    pass\n"
    (Path(folder) / f"{MODULE}.py").write_text(text, encoding="utf-8")


def auto_class(model: PreTrainedModel) -> str:
    """Name of transformers' Auto class that makes models of this one's class."""
    autos = [auto for auto, made in _auto_classes(model).items() if made is type(model)]
    return min(autos, key=lambda auto: auto == "AutoModelForPreTraining", default=type(model).__name__)  # that only if no other


def _auto_classes(model: PreTrainedModel) -> dict[str, type[PreTrainedModel]]:
    """Auto classes by name, with what they make of this architecture: the model's class, or its base."""
    wanted = {type(model), type(getattr(model, model.base_model_prefix, model))}
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    made = {name: auto._model_mapping.get(type(model.config), None) for name, auto in autos.items()}
    return {name: one for name, one in made.items() if one in wanted}
