"""A target's matrix and kind, whether a layer of ours is around it or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .kinds import LayerKind, layer_kind


class Wrapper(nn.Module, ABC):
    """A layer that stands in place of another, its `base_layer` of a `kind`, and computes with a matrix of its own."""

    base_layer: Any  # of the kind's class; Any, because its weight may be None, which torch's types do not know
    kind: LayerKind[Any]

    @abstractmethod
    def computed_matrix(self) -> Tensor:
        """The matrix (out, in) that the layer computes with."""

    @abstractmethod
    def computing(self) -> nn.Module | None:
        """The module that a call hands its input to, if it does nothing else: the base layer or a product, or None."""

    @abstractmethod
    def computed_size(self) -> tuple[int, int] | None:
        """(out, in) of what is left of that matrix, where rows or columns are left out; None: all of it."""


def kind_and_layer(module: nn.Module) -> tuple[LayerKind[Any], nn.Module]:
    """The kind of a layer, factorised already or not, and the layer that has its geometry: of a `Wrapper` the base layer.

    Raises:
        TypeError, ValueError: as for `layer_kind`.
    """
    if isinstance(module, Wrapper):
        return module.kind, module.base_layer
    return layer_kind(module), module


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the matrix of a target, wrapped or not."""
    if isinstance(module, Wrapper):
        return module.kind.shape(module.base_layer)
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"the module is wrapped by another PEFT method already ({type(module).__module__}); merge or unload that one first."
        )
    return layer_kind(module).shape(module)


def features(module: nn.Module) -> tuple[int, int]:
    """How many numbers go out of a target and into it, in a row, as it computes now: (out, in) without what is left out."""
    size = module.computed_size() if isinstance(module, Wrapper) else None
    return matrix_shape(module) if size is None else size
