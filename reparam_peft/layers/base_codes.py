"""A matrix that arrived in few bits, as a part of what corrects it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .dequantizing import is_misread, product


class Dequantizes(Protocol):
    """What knows the numbers of a quantised layer."""

    def own_matrix(self, layer: Any) -> Tensor:
        """W (out, in)."""

    def dtype(self, layer: Any) -> torch.dtype:
        """The dtype of the model around it."""


class BaseCodes(nn.Module):
    """x → W x + b by a quantised layer of the base model, whose codes stay as they are.

    The layer is no child: the base model has it, and an adapter that corrects it neither stores nor moves it.

    Args:
        layer: the quantised layer.
        kind: of it.
    """

    def __init__(self, layer: nn.Module, kind: Dequantizes) -> None:
        super().__init__()
        self._of_base = (layer, kind)

    def forward(self, x: Tensor) -> Tensor:
        layer, kind = self._of_base
        inputs = x.to(kind.dtype(layer))
        y: Tensor = self._right(inputs) if is_misread(layer) else layer(inputs)
        return y.to(x.dtype)

    def _right(self, x: Tensor) -> Tensor:
        y, bias = product(x, lambda dtype: self.matrix().to(dtype)), getattr(self._of_base[0], "bias", None)
        return y if bias is None else y + bias

    def matrix(self) -> Tensor:
        """W (out, in), dequantised at each call."""
        layer, kind = self._of_base
        return kind.own_matrix(layer).detach()
