"""Layers that arrive quantised: what they are told, what they take, and layers in their place that need no quantised model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.storage import LEAST_INPUTS, NF4_BLOCK
from .dequantizing import quant_state
from .factorized import FactorizedModule
from .kinds import QUANTIZED, is_quantized, stored_weight
from .schemes import INT8_MOST, SCHEME_OF, SMALLEST_SCALE


def note_dtype(model: nn.Module) -> None:
    """Tell quantised layers the dtype of the model around them, which bitsandbytes' with 8 bits do not know."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for module in model.modules():
        if is_quantized(module):
            vars(module)["dtype_around"] = dtype


def stored_bytes(layer: nn.Module) -> int:
    """What the numbers of a quantised layer's weight take, with their scales; without tables that all layers share."""
    weight: Any = stored_weight(layer)
    state = quant_state(layer)
    parts = [*_parts(weight), getattr(weight, "SCB", None), getattr(getattr(layer, "state", None), "SCB", None)]
    parts += [getattr(scales, "absmax", None) for scales in (state, getattr(state, "state2", None))]  # scales may have scales
    parts += [getattr(layer, "meta", {}).get(name) for name in ("scale", "zero")]
    different = {id(part): part for part in parts if isinstance(part, Tensor)}
    return sum(part.numel() * part.element_size() for part in different.values())


def _parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def dequantized(layer: nn.Module) -> nn.Module:
    """A plain layer that computes as a quantised one does."""
    plain = QUANTIZED.shell(layer)
    plain.weight = nn.Parameter(QUANTIZED.own_matrix(layer))
    return plain


def with_own_codes(layer: nn.Module) -> FactorizedModule | None:
    """A module in the form "dense" with the codes of a quantised layer, to the bit; None where no scheme of ours has such.

    The scales are the layer's own, in float32. Layers that round their inputs, too, do so no longer.
    """
    own = _own_tensors(layer)
    if own is None:
        return None
    bits, tensors = own
    scale = SCHEME_OF[bits].scale
    tensors[scale] = tensors[scale].clamp(min=SMALLEST_SCALE)  # zero, of a block of zeros
    bias = getattr(layer, "bias", None)
    shell = QUANTIZED.shell(layer)
    rank, dtype = min(QUANTIZED.shape(layer)), QUANTIZED.dtype(layer)
    on_meta = torch.device("meta")
    module = QUANTIZED.factorized(shell, rank, "dense", bias is not None, None, on_meta, dtype, {"W": bits})
    module.coded["B"].set_tensors(tensors)
    if bias is not None:
        module.set_bias(bias)
    return module


def _own_tensors(layer: Any) -> tuple[int, dict[str, Tensor]] | None:
    """The bits, and the tensors of the scheme of so many, that hold the numbers of a quantised layer; None: none does."""
    weight = layer._parameters.get("weight")
    if layer.in_features < LEAST_INPUTS or weight is None:
        return None
    QUANTIZED.put_in_order(layer)
    if (state := quant_state(layer)) is not None:
        if (state.quant_type, state.blocksize) != ("nf4", NF4_BLOCK):
            return None
        scales = state.absmax
        if state.nested:
            functional = SCHEME_OF[4].imported().functional
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return 4, {"weight": weight.detach().view(torch.uint8).reshape(-1, 1), "weight_absmax": scales.float()}
    if hasattr(layer, "state"):
        largest = weight.SCB if layer.state.SCB is None else layer.state.SCB
        codes, scales = weight.detach(), largest.float()[:, None] / INT8_MOST
    elif type(weight).__name__ == "Int8Tensor" and (weight.zero_point is None or not weight.zero_point.any()):
        codes, scales = weight.qdata, weight.scale.float()
    else:
        return None
    fits = codes.dtype == torch.int8 and scales.shape == (layer.out_features, 1)
    return (8, {"weight": codes.as_subclass(Tensor), "weight_scale": scales}) if fits else None
