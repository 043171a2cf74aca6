"""The matrix of a target, its dtype and what its product takes, whether an adapter is around the layer or not."""

from __future__ import annotations

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config.reparam_config import ReparamConfig
from ..defaults import DATA_FREE
from ..layers.factorized import weight_of
from ..layers.kinds import is_quantized, layer_kind
from ..layers.quantized_bases import stored_bytes
from ..layers.wrapper import kind_and_layer, matrix_shape
from ..numerics.storage import AS_THE_MODEL, OF_THE_BASE, Storage
from .layer import ReparamLayer


def source_matrix(module: nn.Module) -> Tensor:
    """The matrix (out, in) that a target is factorised from, wrapped or not."""
    if isinstance(module, ReparamLayer):
        return module.source_matrix()
    return layer_kind(module).own_matrix(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module, of one that adapters save whole."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def base_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a target's weight, wrapped or not, and of its factors in a checkpoint."""
    if isinstance(module, ReparamLayer):
        return module.base_dtype
    return layer_kind(module).dtype(module) if is_quantized(module) else weight_of(module).dtype


def matrix_storage(module: nn.Module, name: str, config: ReparamConfig) -> Storage:
    """What a target's product takes in the form of a config, of which it may have lost rows or columns.

    Raises:
        TypeError, ValueError: the module cannot be factorised, or cannot be of the size that the config says is left.
    """
    shape = matrix_shape(module)
    left = (config.sizes or {}).get(name)
    size = shape if left is None else (left[0], left[1])
    kind, layer = kind_and_layer(module)
    kind.check_size(layer, None if left is None else size)
    # Where rows are left out, so are they of the bias, which then cannot be that of the base model.
    moves = (config.moved_bias and kind.has_one_mean) or size[0] < shape[0]
    bias = moves and getattr(layer, "bias", None) is not None
    form = config.form_pattern.get(name, config.form or DATA_FREE["form"])
    return Storage(
        *size,
        form=form,
        bias=bias,
        whole=None if left is None else shape,
        bits=_bits(config, name, form, layer) if kind.linear else AS_THE_MODEL,
        correction_bits=config.correction_bits or AS_THE_MODEL,
        arrived=stored_bytes(layer) if is_quantized(layer) else None,
    )


def _bits(config: ReparamConfig, name: str, form: str, layer: nn.Module) -> int:
    """Of the numbers of a target's product; of a corrected one, of those of the matrix."""
    if name in (config.dense_modules or ()):
        return AS_THE_MODEL
    if name in config.bit_pattern:
        return config.bit_pattern[name]
    if form != "corrected":
        return AS_THE_MODEL
    if is_quantized(layer) and config.budget != "bytes":
        return OF_THE_BASE
    if config.is_resolved:
        raise ValueError(
            "the adapter corrects the weight of a base model that arrives quantised, and here it does not; load the base model "
            "as it was when the adapter was made."
        )
    return config.least_bits


def own_bias(module: nn.Module) -> Tensor | None:
    """The bias (out,) of a base layer, or None where it has none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
