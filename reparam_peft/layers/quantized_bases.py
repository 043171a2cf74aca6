"""Layers that arrive quantised: what they are told, and plain layers in their place."""

from __future__ import annotations

import torch
from torch import nn

from .kinds import QUANTIZED, is_quantized


def note_dtype(model: nn.Module) -> None:
    """Tell quantised layers the dtype of the model around them, which bitsandbytes' with 8 bits do not know."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for module in model.modules():
        if is_quantized(module):
            vars(module)["dtype_around"] = dtype


def dequantized(layer: nn.Module) -> nn.Module:
    """A plain layer that computes as a quantised one does."""
    plain = QUANTIZED.shell(layer)
    plain.weight = nn.Parameter(QUANTIZED.own_matrix(layer))
    return plain
