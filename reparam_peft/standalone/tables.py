"""Tables of embeddings in 8 bits: those that a model reads tokens from and predicts them with, tied or not, through torchao."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.schemes import Int8

TableScheme = Literal["int8"]
TABLES_SINCE = "0.18"  # of torchao, whose tensors of 8 bits know a look-up since then
TABLES: TableScheme = "int8"  # the one scheme in whose matrices rows can be looked up
SCHEME = Int8()


def check_tables(scheme: str | None) -> None:
    """Raise where tables cannot be stored so, or the library is not installed.

    Raises:
        ValueError, ImportError
    """
    if scheme is not None:
        if scheme != TABLES:
            raise ValueError(f"`quantize_tables` must be {TABLES!r} or None, got {scheme!r}.")
        torchao = SCHEME.imported()
        if Version(torchao.__version__) < Version(TABLES_SINCE):
            raise ImportError(
                f"quantised tables need torchao {TABLES_SINCE}, and {torchao.__version__} is installed; upgrade it."
            )


def tables_of(model: PreTrainedModel) -> list[str]:
    """Names of a model's input and output embeddings that are not factorised; of tied ones, of that whose weight is saved.

    Raises:
        ValueError: there are none.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and any(module is table for table in tables)
    ]
    stored = [name for name in names if f"{name}.weight" not in model.all_tied_weights_keys]
    if not stored:
        raise ValueError("`quantize_tables`: the model has no table of embeddings that is not factorised; leave it out.")
    return stored


def quantize_tables(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Quantise tables in place, and with them the modules that they are tied to."""
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        _put(model, weight, SCHEME.quantize(weight), weight.dtype)


def prepare_tables(model: PreTrainedModel, names: Iterable[str]) -> torch.dtype | None:
    """Give tables on the meta device the tensors that a checkpoint is to fill in; returns the dtype that they had, if any.

    Raises:
        ValueError: a module of such a name is no table.
    """
    dtype = None
    for name in names:
        table = model.get_submodule(name)
        if not isinstance(table, nn.Embedding | nn.Linear):
            raise ValueError(f"{name}: config.json says that this table is quantised, but it is a {type(table).__name__}.")
        dtype = table.weight.dtype
        for key, tensor in SCHEME.empty(*table.get_parameter("weight").shape).items():
            if key == "weight":
                table.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                table.register_buffer(key, tensor)
        vars(table)["_is_hf_initialized"] = True  # transformers is to initialise nothing in it
    return dtype


def finish_tables(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype | None) -> None:
    """Have tables, and modules that they are tied to, compute with what a checkpoint has filled in.

    Raises:
        ValueError: they are not on a device, were not loaded, or have scales that are NaN or infinite.
    """
    for name in names:
        table = model.get_submodule(name)
        weight, scale = table.get_parameter("weight"), table.get_buffer("weight_scale")
        if weight.is_meta or scale.is_meta:
            raise ValueError(f"{name}: quantised tables cannot be offloaded; give a `device_map` without disk or spare CPU.")
        if not scale.isfinite().all() or not all(hasattr(tensor, "_is_hf_initialized") for tensor in (weight, scale)):
            raise ValueError(f"{name}: the quantised table was not loaded, or its scales hold NaN or infinite values.")
        del table.weight_scale
        _put(model, weight, {"weight": weight.detach(), "weight_scale": scale}, dtype or scale.dtype)


def tables_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What a checkpoint holds of quantised tables, by the names of their weights."""
    return {f"{name}.{key}": tensor for name in names for key, tensor in SCHEME.tensors(model.get_submodule(name)).items()}


def _put(model: nn.Module, weight: nn.Parameter, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Have every module that has a weight compute with quantised tensors in its place, one parameter for all of them."""
    quantized = nn.Parameter(SCHEME.matrix(tensors, dtype), requires_grad=False)
    for module in model.modules():
        if module._parameters.get("weight") is weight:
            module.weight = quantized
