"""`from_config` of a standalone checkpoint's config: factorised layers, as the checkpoint has them, with random factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.factorized import FactorizedModule
from ..layers.pivot_expansion import PivotExpansion
from ..layers.schemes import check_scheme
from ..runtime.hosts import extend
from .checkpoint import (
    METHOD,
    CheckpointConfig,
    CheckpointLoader,
    keep_names,
    mark_unquantized,
    place_factorized,
)
from .heads import tie
from .opened import mark_opened, open_named
from .quantization import quantize
from .tables import TABLES, check_tables, quantize_tables


def register_from_config() -> None:
    """Make transformers' `from_config` know standalone checkpoints. Idempotent."""
    extend(PreTrainedModel, "_from_config", _with_factors)


def _with_factors(original: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    def from_config(cls: type[PreTrainedModel], config: Any, **kwargs: Any) -> PreTrainedModel:
        described = getattr(config, "quantization_config", None)
        if isinstance(described, Mapping) and described.get("quant_method") == METHOD:
            described = CheckpointConfig(**described)
        if not isinstance(described, CheckpointConfig) or described.being_loaded:
            return original(cls, config, **kwargs)
        # The models within this one are made by `from_config` too, some of them with the very same config.
        config = copy.deepcopy(config)
        del config.quantization_config
        return factorized(original(cls, config, **kwargs), described)

    return from_config


def factorized(model: PreTrainedModel, described: CheckpointConfig) -> PreTrainedModel:
    """A model whose named layers are factorised, in place, with random factors: what a state dict is loaded into.

    Args:
        model: dense, of random weights.
        described: the layers.

    Raises:
        ImportError: the library of its quantisation is missing.
        ValueError: the model has none of the layers.
    """
    scheme = described.quantization
    check_scheme(scheme)
    open_named(model, described.layers, described.parameters or {})
    devices = {name: next(module.parameters(), torch.empty(0)).device for name, module in model.named_modules()}
    layers = place_factorized(model, described.layers)
    tied = tie(model, described.tied or {})
    for name in layers:
        module = model.get_submodule(name)
        module.to_empty(device=devices[name])
        _fill_at_random(module)
    model.config.quantization_config = CheckpointConfig(
        layers, quantization=scheme, parameters=described.parameters, tables=described.tables, tied=tied
    )
    model.hf_quantizer = CheckpointLoader(model.config.quantization_config)  # type: ignore[assignment]
    mark_unquantized(model)
    keep_names(model)
    if scheme is not None:
        quantize(model, scheme)
    if described.tables is not None:
        check_tables(TABLES)
        quantize_tables(model, described.tables)
    mark_opened(model)
    if not any(devices[name].type == "meta" for name in layers):  # what reads the weight itself gets the product
        for name in layers:  # on meta, loaders look for a place for the marker
            cast(FactorizedModule, model.get_submodule(name)).unmark()
    return model


def _fill_at_random(module: nn.Module) -> None:
    for child in module.modules():
        reset: Any = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
        if isinstance(child, PivotExpansion):
            child.set_pivots(torch.arange(child.rank, device=child.mask.device))
        if isinstance(child, FactorizedModule):
            for tensor in [child.bias, *(buffer for _, buffer in child.named_buffers(recurse=False))]:
                if tensor is not None:
                    nn.init.zeros_(tensor)
            child.keep_first()
