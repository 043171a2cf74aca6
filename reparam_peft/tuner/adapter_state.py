"""The factors of an adapter in a checkpoint: their keys, their dtype, their first columns and rows, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config.reparam_config import ReparamConfig
from ..layers.factorized import FactorizedModule
from ..runtime.modules import set_module
from .arrivals import DAMAGED
from .layer import ReparamLayer, reparam_layers
from .tying import untie_heads

PREFIX = "base_model.model."  # of names in a `PeftModel`, and in the files


def factor_keys(name: str, layer: ReparamLayer, adapter_name: str) -> dict[str, Tensor]:
    """State-dict keys of what an adapter stores for a layer, with its parameters and buffers."""
    if adapter_name not in layer.reparam_factors:
        return {}
    prefix = f"{name}." if name else ""
    state = layer.factorized(adapter_name).state_dict(keep_vars=True)
    return {f"{prefix}reparam_factors.{adapter_name}.{key}": tensor for key, tensor in state.items()}


def names_in_model(model: nn.Module, adapter_name: str, in_file: Callable[[str], str]) -> dict[str, str]:
    """What an adapter's tensors are called in a model, by their names in files.

    Args:
        model: that holds the adapter, a `PeftModel` or one that was given adapters by itself, whose names lack PEFT's prefix.
        adapter_name: its name.
        in_file: makes a name in files of one in the model.
    """
    names = {}
    for name, layer in reparam_layers(model):
        for key in factor_keys(name, layer, adapter_name):
            stored = in_file(key)
            names[stored] = names[PREFIX + stored.removeprefix(PREFIX)] = key
    return names


def check_whole(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Raise `ValueError` where a state dict lacks tensors of an adapter, or has them empty or in part, as sharded models do.

    Args:
        model: that holds the adapter.
        adapter_name: its name.
        state: tensors under the names that they have in the model, of all that is to be saved.
    """
    remedy = "Gather the whole state dict first, for example with `accelerator.get_state_dict(model)`; nothing was saved."
    for name, layer in reparam_layers(model):
        if adapter_name not in layer.reparam_factors:
            continue
        module = layer.factorized(adapter_name)
        whole = layer.like(adapter_name)
        expected = whole.state_dict()
        if module.feature_mean is not None:
            expected["feature_mean"] = torch.empty(module.rank, device="meta")
        for key, tensor in expected.items():
            full = f"{name}.reparam_factors.{adapter_name}.{key}" if name else f"reparam_factors.{adapter_name}.{key}"
            present = state.get(full)
            if present is None or present.shape != tensor.shape:
                shape = "is missing" if present is None else f"has shape {tuple(present.shape)}, not {tuple(tensor.shape)}"
                raise ValueError(f"{full}: the tensor {shape} in the state dict, as of a model that is sharded. {remedy}")
    for key, tensor in state.items():
        if f".modules_to_save.{adapter_name}." in key and tensor.numel() == 0:
            raise ValueError(f"{key}: the tensor is empty in the state dict, as of a model that is sharded. {remedy}")


def cast_to_base(name: str, layer: ReparamLayer, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Bring the factors of a layer in a state dict, which may train in float32, to the base model's dtype.

    Raises:
        RuntimeError: they were never loaded.
        ValueError: one is not finite, or not in that dtype.
    """
    if adapter_name in layer.arrivals.awaited:
        raise RuntimeError(f"{name}: the factors of adapter {adapter_name!r} were never loaded; run the model once first.")
    keys = factor_keys(name, layer, adapter_name)
    scales = {id(scale) for scale in layer.factorized(adapter_name).scales.values()} if keys else set()
    for key, present in keys.items():
        if key in state and state[key].is_floating_point():
            state[key] = state[key].to(torch.float32 if id(present) in scales else layer.base_dtype)
            if not torch.isfinite(state[key]).all():
                raise ValueError(
                    f"{key}: the factor holds NaN or inf, or overflows {layer.base_dtype} in which it is saved; "
                    "it was not saved. Lower the learning rate, or use a base model in a wider dtype."
                )


def fit_to_model(model: nn.Module, config: ReparamConfig, adapter_name: str, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that the model has a place for, checked and cut to its ranks; changes `loaded` for this.

    Where they do not fit, an adapter that waits for them is taken out of the model again.

    Raises:
        ValueError: the checkpoint lacks factors, holds NaN or inf, or their shapes are not those of the config; or the adapter
            is merged.
    """
    try:
        expected: set[str] = set()
        for name, layer in reparam_layers(model):
            rank_in_file = config.ranks_in_file.get(name.removeprefix(PREFIX))
            if rank_in_file is not None and adapter_name in layer.r:
                cut(name, layer, adapter_name, rank_in_file, loaded)
            keys = factor_keys(name, layer, adapter_name)
            expected.update(keys)
            module = layer.factorized(adapter_name) if keys else None
            for key, present in keys.items():
                check_loaded_tensor(key, loaded.get(key), present, {} if module is None else module.masks)
            if module is not None:
                _check_codes(f"{name}.reparam_factors.{adapter_name}.", module, loaded)
            if adapter_name in layer.merged_adapters:
                raise ValueError(f"{name}: adapter {adapter_name!r} is merged; unmerge it before loading others into it.")
        # A config for a lower size may leave targets dense whose factors are in the file.
        dense = config.ranks_in_file.keys() - config.rank_pattern.keys()
        owners = {key: key.removeprefix(PREFIX).partition(".reparam_factors.")[0] for key in loaded}
        fitting = {key: tensor for key, tensor in loaded.items() if owners[key] not in dense}
        homeless = sorted(key for key in fitting if ".reparam_factors." in key and key not in expected)
        if homeless:
            raise ValueError(
                f"{homeless[0]}: the model has no place for this factor, nor for {len(homeless) - 1} other tensors of the "
                "checkpoint; it is of another base model, or its config was changed."
            )
    except ValueError:
        withdraw(model, adapter_name)
        raise
    return fitting


def _check_codes(prefix: str, module: FactorizedModule, loaded: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where the numbers in few bits of a module are none in a checkpoint, whose tensors have a prefix."""
    for name, piece in module.coded.items():
        try:
            scale = piece.scheme.scale
            if loaded[f"{prefix}{name}.{scale}"].dtype != torch.float32:  # else they would be others than were saved
                raise ValueError(f"`{scale}` holds scales in {loaded[f'{prefix}{name}.{scale}'].dtype}, and they are float32.")
            piece.scheme.check({part: loaded[f"{prefix}{name}.{part}"] for part in piece.tensors})
        except ValueError as error:
            raise ValueError(f"{prefix.removeprefix(PREFIX)}{name}: {error} {DAMAGED[0].upper()}{DAMAGED[1:]}.") from error


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter whose factors did not arrive out of the model again, and its layers where it was their only one."""
    awaiting = [(name, layer) for name, layer in reparam_layers(model) if adapter_name in layer.arrivals.awaited]
    for name, layer in awaiting:
        layer.delete_adapter(adapter_name)
        if not layer.reparam_factors:
            set_module(model, name, layer.base_layer)
    untie_heads(model)
    holder: Any = model  # of the configs; one dict, which PEFT's model and the model in it share
    if awaiting and len(holder.peft_config) > 1:
        del holder.peft_config[adapter_name]
    elif awaiting:
        del (holder.base_model.model if isinstance(model, PeftModel) else holder).peft_config


def cut(name: str, layer: ReparamLayer, adapter_name: str, rank_in_file: int, loaded: dict[str, Tensor]) -> None:
    """Of the factors of a layer in a checkpoint the first columns and rows, and the bias that goes with them.

    A bias holds the mean of the outputs: b + (W − A B) E[x]. Without columns of A it grows by what these gave in the mean.

    Raises:
        ValueError: the checkpoint has a bias, and no mean of the features B x that fits.
    """
    rank, present = layer.r[adapter_name], factor_keys(name, layer, adapter_name)
    if layer.factorized(adapter_name).form == "dense":  # which is the same at every size
        return
    for key in [key for key in present if key.endswith(".bias") and key in loaded]:
        # The model has no such tensor at this size, so that PEFT has left the key as it is in the file.
        key_of_mean = key.removesuffix(f"{adapter_name}.bias") + "feature_mean"
        means = [loaded.pop(f"{prefix}{key_of_mean}", None) for prefix in ("", PREFIX)]
        A, mean = loaded.get(key.removesuffix("bias") + "A.weight"), next((mean for mean in means if mean is not None), None)
        if A is None or mean is None or mean.shape != (rank_in_file,) or A.shape[:2] != (len(loaded[key]), rank_in_file):
            raise ValueError(f"{key_of_mean}: the checkpoint has no such tensor that fits; {DAMAGED}.")
        lost = A.flatten(1)[:, rank:].float() @ mean[rank:].float()
        loaded[key] = (loaded[key].float() + lost).to(loaded[key].dtype)
    for key in present.keys() & loaded.keys():
        loaded[key] = _first(loaded[key], present[key].shape, rank_in_file, rank)


def _first(tensor: Tensor, shape: torch.Size, rank_in_file: int, rank: int) -> Tensor:
    """Of a factor in a checkpoint the first columns or rows, where its rank is lower in the model; anything else as it is."""
    if tensor.ndim != len(shape) or tensor.shape == shape:
        return tensor
    for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if (size, wanted) == (rank_in_file, rank):
            tensor = tensor.narrow(dim, 0, rank)
    return tensor.clone()  # without the memory of what is left out


def check_loaded_tensor(key: str, tensor: Tensor | None, present: Tensor, masks: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ValueError` where a tensor of a checkpoint is missing, misshapen or not finite, or a mask does not fit.

    Args:
        key: of the tensor.
        tensor: in the checkpoint.
        present: the one that it is to take the place of.
        masks: of the module that it belongs to, as `FactorizedModule.masks`.
    """
    name = key.removeprefix(PREFIX)
    if tensor is None:
        raise ValueError(f"{name}: the checkpoint has no such tensor; {DAMAGED}.")
    is_mask = not present.is_floating_point()  # or codes of numbers in few bits
    if tensor.shape != present.shape or tensor.is_floating_point() == is_mask or (is_mask and tensor.dtype != present.dtype):
        raise ValueError(
            f"{name}: the checkpoint has shape {tuple(tensor.shape)}, {tensor.dtype}, and its config on this model says "
            f"{tuple(present.shape)}, {present.dtype}; the two do not belong together."
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: the checkpoint contains NaN or infinite values; {DAMAGED}.")
    if not torch.isfinite(tensor.to(present.dtype)).all():
        raise ValueError(
            f"{name}: the values in the checkpoint overflow {present.dtype}, which the base model is in; load that in a wider "
            "dtype."
        )
    mask = next((mask for mask in masks if is_mask and name.endswith(f".{mask}")), None)
    if mask is not None:
        count, features = masks[mask]
        marked = (int.from_bytes(bytes(tensor.tolist()), "little") & ((1 << features) - 1)).bit_count()
        if marked != count:
            what = f"rows as pivots, and the rank is {count}" if mask == "A.mask" else f"of {features} as kept, and {count} are"
            raise ValueError(f"{name}: the checkpoint marks {marked} {what}; {DAMAGED}.")
