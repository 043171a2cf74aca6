"""From a PEFT model to a plain transformers model with factorised layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arguments import ReparamWarning
from ..calibration.statistics import Statistics
from ..config.fields import Fields
from ..layers.factorized import FactorizedModule
from ..layers.kinds import QUANTIZED, is_quantized
from ..layers.parameters import opened_parameters
from ..layers.quantized_bases import dequantized, note_dtype, with_own_codes
from ..layers.schemes import check_scheme
from ..runtime.modules import abridged
from ..standalone.checkpoint import (
    METHOD,
    CheckpointConfig,
    CheckpointLoader,
    keep_names,
    mark_unquantized,
)
from ..standalone.heads import forget_tied
from ..standalone.opened import mark_opened
from ..standalone.quantization import quantize as quantize_factors
from ..standalone.specification import mark, specification_of
from ..standalone.tables import check_tables, tables_of
from ..standalone.tables import quantize_tables as put_tables
from .layer import ReparamLayer
from .opening import close_parameters
from .rounding import CalibratedRounding


def standalone_model(
    model: nn.Module,
    quantize: str | None = None,
    quantize_tables: str | None = None,
    statistics: Statistics | None = None,
    configs: Mapping[str, PeftConfig] | None = None,
) -> PreTrainedModel:
    """A transformers model as it computes with its active adapter, without any of PEFT's modules.

    Args:
        model: with `ReparamLayer`s; stays as it is. Its tensors are shared, not copied.
        quantize: "int8" or "int4", for the matrices of factors; None: as they are.
        quantize_tables: "int8", for tables of embeddings that are not factorised; None: as they are.
        statistics: of the model's calibration, with which `quantize` rounds so that outputs stay near; None: numbers do.
        configs: of its adapters, by name, for the model card.

    Raises:
        TypeError: not a transformers model, or it holds modules of other PEFT methods.
        ValueError: an adapter is merged or was never loaded, several are active, or none is and W is gone; or there is no
            table to be quantised, or `statistics` are without `quantize`, or of another model.
        ImportError: the library of `quantize` or `quantize_tables` is missing.
    """
    check_scheme(quantize)
    check_tables(quantize_tables)
    if statistics is not None and quantize is None:
        raise ValueError("`statistics` have an effect with `quantize` only; give both or neither.")
    made_with = _config_of_active(model, configs or {})
    if statistics is not None and made_with is not None and made_with.healed_for is not None:
        warnings.warn(
            f"The factors were healed with `quantize={made_with.healed_for!r}`, for each number rounded to the nearest, which "
            "`statistics` undo, at a loss; leave them out.",
            ReparamWarning,
            stacklevel=4,
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"a standalone model is a transformers model, and a {type(model).__name__} is none; keep the adapter.")
    # A copy of everything but the tensors, with PEFT's modules replaced wherever they stand; tied parameters stay tied.
    memo: dict[int, Any] = {id(tensor): _sharing(tensor) for tensor in chain(model.parameters(), model.buffers())}
    note_dtype(model)
    # Under a budget of bytes it was counted with what its codes take.
    keeps_codes = {*(made_with.dense_modules or ())} if made_with is not None and made_with.budget == "bytes" else set[str]()
    widened: list[str] = []
    for name, module in reversed(list(model.named_modules())):  # what is inside of others first
        if is_quantized(module):
            coded = with_own_codes(module) if name in keeps_codes else None
            if coded is not None:
                mark(coded.train(module.training), name, QUANTIZED, torch.Size(QUANTIZED.shape(module)))
            elif name in keeps_codes:
                widened.append(name)
            memo[id(module)] = dequantized(module) if coded is None else coded
        if not _is_wrapper(module):
            continue
        replacement = _factorized(name, module) if isinstance(module, ReparamLayer) else _unwrapped(name, module)
        is_new = isinstance(replacement, FactorizedModule)
        memo[id(module)] = replacement.train(model.training) if is_new else copy.deepcopy(replacement, memo)
    if widened:
        warnings.warn(
            f"{len(widened)} matrices keep the codes in which they arrived, and a standalone model has no such codes: they are "
            f"dequantised to the dtype of the model, which takes more bytes than were planned: {', '.join(abridged(widened))}.",
            ReparamWarning,
            stacklevel=4,
        )
    plain: Any = copy.deepcopy(model, memo)  # Any: what transformers sets on its models, its types do not know
    vars(plain).pop("peft_config", None)
    close_parameters(plain)
    layers = {name: specification_of(module) for name, module in plain.named_modules() if isinstance(module, FactorizedModule)}
    opened = opened_parameters(plain)
    patterns = {name: parameter.reading.pattern() for name, parameter in opened.items()}
    if not layers:
        raise ValueError("no layer has factors in the active adapter, so that the model is a dense one; use `unload`.")
    mark_unquantized(plain)
    keep_names(plain)
    tables = None if quantize_tables is None else dict.fromkeys(tables_of(plain), quantize_tables)
    plain.config.quantization_config = CheckpointConfig(
        layers, quantization=quantize, parameters=patterns, tables=tables, tied=forget_tied(plain)
    )
    plain.config.quantization_config.made_with = copy.copy(made_with)
    plain.hf_quantizer = CheckpointLoader(plain.config.quantization_config)
    if quantize is not None:
        rounding = None if statistics is None else CalibratedRounding(statistics)
        if rounding is not None:
            rounding.check(plain)
        quantize_factors(plain, quantize, rounding)
    if tables is not None:
        put_tables(plain, tables)
    if quantize is not None or tables is not None:
        plain.is_quantized, plain.quantization_method = True, METHOD
    for module in plain.modules():
        if isinstance(module, FactorizedModule):
            module.unmark()
    mark_opened(plain)
    return plain


def _config_of_active(model: nn.Module, configs: Mapping[str, PeftConfig]) -> Fields | None:
    layer = next((module for module in model.modules() if isinstance(module, ReparamLayer)), None)
    names = configs if layer is None else layer.active_adapters  # where every matrix stays as it is, there is no layer of ours
    active = (configs.get(name) for name in names)
    return next((config for config in active if isinstance(config, Fields)), None)


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
    layer.arrivals.check_complete()
    active = [adapter for adapter in layer.active_adapters if adapter in layer.reparam_factors]
    layer.check_active(active)
    if len(active) > 1:
        raise ValueError(f"{name}: adapters {active} are active; activate one of them with `set_adapter`.")
    if layer.disable_adapters or not active:
        return layer.base_layer
    present = layer.factorized(active[0])
    if layer.keeps_codes and present.form == "corrected":
        raise ValueError(
            f"{name}: adapter {active[0]!r} corrects the weight of a base model that arrived quantised, which a standalone "
            "model does not have; keep the adapter beside the base model, or call `merge_and_unload`."
        )
    bias = getattr(layer.base_layer, "bias", None) if present.bias is None else present.bias
    module = layer.like(active[0], bias=bias is not None)
    module.set_factors(present.stored, present.scales)
    for piece, coded in module.coded.items():
        coded.share(present.coded[piece])
    module.set_kept(present.rows, present.columns)
    if bias is not None:
        module.set_bias(bias)
    return mark(module, name, layer.kind, layer.weight_shape)


def _sharing(tensor: Tensor) -> Tensor:
    """The same numbers in a tensor of its own, trainable where it is a parameter of a floating dtype."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.data, requires_grad=tensor.is_floating_point())
