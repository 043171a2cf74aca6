"""The factors of an adapter in a checkpoint: their keys, their first columns and rows, and whether they fit the model."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import DAMAGED, ReparamLayer


def factor_keys(name: str, layer: ReparamLayer, adapter_name: str) -> dict[str, Tensor]:
    """State-dict keys of what an adapter stores for a layer, with its parameters and buffers."""
    if adapter_name not in layer.reparam_factors:
        return {}
    prefix = f"{name}." if name else ""
    factors = layer.reparam_factors[adapter_name]
    return {f"{prefix}reparam_factors.{adapter_name}.{key}": own for key, own in factors.state_dict(keep_vars=True).items()}


def cut(name: str, layer: ReparamLayer, adapter_name: str, rank_in_file: int, loaded: dict[str, Tensor]) -> None:
    """Of the factors of a layer in a checkpoint the first columns and rows, and the bias that goes with them.

    A bias holds the mean of the outputs: b + (W − A B) E[x]. Without columns of A it grows by what these gave in the mean.

    Raises:
        ValueError: the checkpoint has a bias, and no mean of the features B x that fits.
    """
    rank, own = layer.r[adapter_name], factor_keys(name, layer, adapter_name)
    for key in [key for key in own if key.endswith(".bias") and key in loaded]:
        # The model has no such tensor at this size, so that PEFT has left the key as it is in the file.
        key_of_mean = key.removesuffix(f"{adapter_name}.bias") + "feature_mean"
        found = [loaded.pop(f"{prefix}{key_of_mean}", None) for prefix in ("", "base_model.model.")]
        A, mean = loaded.get(key.removesuffix("bias") + "A.weight"), next((t for t in found if t is not None), None)
        if A is None or mean is None or mean.shape != (rank_in_file,) or A.shape[:2] != (len(loaded[key]), rank_in_file):
            raise ValueError(f"{key_of_mean}: the checkpoint has no such tensor that fits; {DAMAGED}.")
        lost = A.flatten(1)[:, rank:].float() @ mean[rank:].float()
        loaded[key] = (loaded[key].float() + lost).to(loaded[key].dtype)
    for key in own.keys() & loaded.keys():
        loaded[key] = _first(loaded[key], own[key], rank_in_file, rank)


def _first(tensor: Tensor, own: Tensor, rank_in_file: int, rank: int) -> Tensor:
    """Of a factor in a checkpoint the first columns or rows, where its own rank is lower; anything else as it is."""
    if tensor.ndim != own.ndim or tensor.shape == own.shape:
        return tensor
    for dim, (size, wanted) in enumerate(zip(tensor.shape, own.shape, strict=True)):
        if (size, wanted) == (rank_in_file, rank):
            tensor = tensor.narrow(dim, 0, rank)
    return tensor.clone()  # without the memory of what is left out


def check_loaded_tensor(key: str, tensor: Tensor | None, own: Tensor, rank: int, out_features: int) -> None:
    """Raise `ValueError` where a tensor of a checkpoint is missing, misshapen or not finite, or a mask is not of the rank."""
    name = key.removeprefix("base_model.model.")
    if tensor is None:
        raise ValueError(f"{name}: the checkpoint has no such tensor; {DAMAGED}.")
    is_mask = not own.is_floating_point()
    if tensor.shape != own.shape or tensor.is_floating_point() == is_mask or (is_mask and tensor.dtype != own.dtype):
        raise ValueError(
            f"{name}: the checkpoint has shape {tuple(tensor.shape)}, {tensor.dtype}, and its config on this model says "
            f"{tuple(own.shape)}, {own.dtype}; the two do not belong together."
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: the checkpoint contains NaN or infinite values; {DAMAGED}.")
    if is_mask:
        marked = int.from_bytes(bytes(tensor.tolist()), "little") & ((1 << out_features) - 1)
        if marked.bit_count() != rank:
            raise ValueError(
                f"{name}: the checkpoint marks {marked.bit_count()} rows as pivots, and the rank is {rank}; {DAMAGED}."
            )
