"""What a kind of layer is: a matrix, the rows that it multiplies, and a factorised module in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.types import Device

from .coded import ALL_AS_THE_MODEL, Widths
from .factorized import Dtype, FactorizedModule, weight_of

Layer = TypeVar("Layer", bound=nn.Module)
CALLED = "_is_called"  # an attribute of output layers of nn.MultiheadAttention that are called, as those of opened ones are


class LayerKind(ABC, Generic[Layer]):
    """A kind of layer that computes y = W x + b for a matrix W (out, in) and rows x that it makes from its input."""

    layer_class: type[nn.Module]
    one_hot = False  # whether each row picks one column, so that Gram matrices are diagonal
    linear = False  # whether the last dimension of the input is x, and that of the output y
    has_positions = False  # whether each position of the input is one row, so that masks of tokens say which rows count
    has_one_mean = True  # whether all outputs have the same mean input E[x], so that W E[x] + b is the mean of the output

    @property
    def name(self) -> str:
        """What the tuner's layers around layers of this kind are called.

        PEFT's `"all-linear"` finds tuner layers by it: those that have "Linear" in it.
        """
        return self.layer_class.__name__

    def check(self, layer: Layer) -> None:
        """Raise `TypeError` or `ValueError`, with the reason and the remedy, where this layer cannot be factorised."""
        if _is_read(layer):
            raise TypeError(
                "an nn.MultiheadAttention that is no plain one, or is still being loaded, reads the weight of its output layer "
                "itself. Load the model first, or leave it out with `exclude_modules`."
            )
        if not self.computes_alike(layer):
            raise TypeError(
                f"a {type(layer).__name__} computes differently from {self.layer_class.__name__} and cannot be factorised; "
                "leave it out with `exclude_modules`."
            )
        if is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise TypeError(
                f"the weight of this {type(layer).__name__} is not a plain parameter; remove its parametrisation, or leave it "
                "out with `exclude_modules`."
            )
        dtype = weight_of(layer).dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"the weight of this {type(layer).__name__} has dtype {dtype}; dequantise it first, or leave it "
                "out with `exclude_modules`."
            )

    def computes_alike(self, layer: Layer) -> bool:
        """Whether the layer computes as its class does."""
        # accelerate replaces `forward` to move inputs between devices, and leaves the class's own on the layer afterwards.
        forward = vars(layer).get("forward")
        own = forward is None or getattr(forward, "__func__", None) is type(layer).forward
        if _is_read(layer) or not (own or hasattr(layer, "_hf_hook")):
            return False
        return type(layer).forward is self.layer_class.forward or self.tried_alike(layer)

    def tried_alike(self, layer: Layer) -> bool:
        """Whether a layer whose class has a `forward` of its own was seen to compute alike; False where nothing is tried."""
        return False

    @abstractmethod
    def shape(self, layer: Layer) -> tuple[int, int]:
        """(out, in) of the matrix, also of a layer whose weight was dropped."""

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer is of this kind, or a variant that `check` may rule out."""
        return isinstance(layer, self.layer_class)

    def dtype(self, layer: Layer) -> torch.dtype:
        """The dtype of a layer's numbers, and of the factors in their place."""
        return weight_of(layer).dtype

    def own_matrix(self, layer: Layer) -> Tensor:
        """W, shape (out, in), of a layer that has it."""
        return self.matrix(weight_of(layer).detach())

    def shell(self, layer: Layer) -> nn.Module:
        """What stays of a layer beside its factors, and gives up W once they exist: the layer itself, where that can."""
        return layer

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """W, shape (out, in): a view of a layer's weight."""

    @abstractmethod
    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`: W (out, in) in the `shape` of a layer's weight, contiguous."""

    @abstractmethod
    def rows(self, layer: Layer, inputs: Tensor) -> Tensor:
        """X, shape (n, in): the rows that W multiplies, one for each row of outputs (n, out)."""

    @abstractmethod
    def factorized(
        self,
        layer: Layer,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedModule:
        """The factorised module with parameters of arbitrary content, in a form, with or without a bias of its own.

        With a `size` it is one of that many outputs and inputs (out, in), for what is left of the matrix. `widths` are of its
        matrices that are in few bits, and are for kinds that are `linear` only.
        """

    def reading(self, layer: Layer) -> tuple[Any, ...]:
        """What, beside the input, rows depend on: layers that read the same input share rows where this is equal."""
        return ()

    def check_size(self, layer: Layer, size: tuple[int, int] | None) -> None:
        """Raise `ValueError` unless so many rows and columns (out, in) can be left of the matrix of a layer; None: all."""
        if size is None:
            return
        if not self.linear:
            raise ValueError(f"a {type(layer).__name__} has no neurons that could be left out, and its size is to be {size}.")
        shape = self.shape(layer)
        if not all(1 <= left <= features for left, features in zip(size, shape, strict=True)) or tuple(size) == shape:
            raise ValueError(f"the size that is left of a matrix {shape} must be at least (1, 1) and smaller, got {size}.")

    def gradient_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        """g, shape (n, out): the rows of gradients with respect to W x, of gradients with respect to the layer's output."""
        return gradients.reshape(-1, gradients.shape[-1])

    def row_counts(self, layer: Layer, inputs: Tensor) -> Tensor:
        """The diagonal of G = XᵀX, shape (in,): all of it for a kind whose rows are one-hot."""
        return self.rows(layer, inputs).square().sum(0)


def _is_read(layer: nn.Module) -> bool:
    """Whether a layer is the output of an nn.MultiheadAttention, which reads its weight and does not call it."""
    return isinstance(layer, NonDynamicallyQuantizableLinear) and CALLED not in vars(layer)
