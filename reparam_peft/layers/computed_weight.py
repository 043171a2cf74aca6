"""The weight of a layer that holds a product in its place: computed where a model reads its numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..arguments import ReparamWarning

# What is known without the numbers. Models of transformers ask for dtype and device of some layers in each forward pass.
_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")
_OF_TENSORS: Any = Tensor  # its types do not know what its attributes are made of
WITHOUT_NUMBERS = {
    *(getattr(_OF_TENSORS, name).__get__ for name in (*_ATTRIBUTES, "requires_grad", "is_leaf", "itemsize", "nbytes")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.get_device, Tensor.__len__),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, torch.numel),
}
FROZEN = {_OF_TENSORS.requires_grad.__set__, Tensor.requires_grad_}
POINTERS = {Tensor.data_ptr, Tensor.untyped_storage}
DETACHED = {_OF_TENSORS.data.__get__, Tensor.detach, torch.detach}


class ComputedWeight(Tensor):
    """A tensor in the shape, dtype and device of a weight, whose numbers are computed by each operation that needs them.

    It takes no memory, and cannot be written to: what holds its numbers are the factors.
    """

    compute: Callable[[], Tensor]
    layer_name: str
    pointed_to: Tensor

    @staticmethod
    def of(placeholder: Tensor, shape: Sequence[int], compute: Callable[[], Tensor], layer_name: str) -> ComputedWeight:
        """A weight of a layer.

        Args:
            placeholder: any number, of its dtype and on its device.
            shape: of it.
            compute: makes its numbers, of this shape, dtype and device, through which gradients flow.
            layer_name: for messages; "" where it is not known.
        """
        weight = placeholder.detach().expand(tuple(shape)).as_subclass(ComputedWeight)
        weight.compute, weight.layer_name = compute, layer_name
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WITHOUT_NUMBERS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, ComputedWeight) and func in DETACHED:  # and can be written to no more than this one
            with torch._C.DisableTorchFunctionSubclass():
                return cls.of(first, first.shape, lambda: first.compute().detach(), first.layer_name)
        if isinstance(first, ComputedWeight):
            if func in FROZEN and not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
                return first  # it never has a gradient of its own
            if func in POINTERS:  # what points to the numbers must not outlive them
                first.pointed_to = first.compute()
                return func(first.pointed_to)
        written = [*tree_flatten(first if _writes(func) else None)[0], *tree_flatten(kwargs.get("out"))[0]]
        for target in written:
            if isinstance(target, ComputedWeight):
                raise RuntimeError(
                    f"{target.layer_name or 'a factorised layer'}: its weight is the product of its factors and cannot be "
                    "written to. Leave it out with `exclude_modules` where the model writes to its weights itself; else change "
                    "the factors, or merge the adapter first (`merge_and_unload`)."
                )
        leaves, structure = tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, ComputedWeight):
                _tell_of_reading(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", leaf.layer_name))
                leaves[index] = leaf.compute()
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    """Whether a function of torch's changes its first argument."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or name in ("__set__", "__setitem__")
        or bool(re.fullmatch("__i(add|sub|mul|div|truediv|pow|and|or|xor)__", name))
    )


@cache  # once for all layers of a kind
def _tell_of_reading(layer_name: str) -> None:
    warnings.warn(
        f"{layer_name or 'a factorised layer'}: the model reads this weight itself, so that it is computed from the factors in "
        "each pass: such a layer saves storage, and no arithmetic. Leave it out with `exclude_modules` where speed counts.",
        ReparamWarning,
        stacklevel=3,  # whoever read it
    )


class MatrixInShape(Protocol):
    """What knows how a kind of layer stores its matrix."""

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """W (out, in) in the `shape` of a layer's weight."""


@dataclass(frozen=True)
class Replaced:
    """The layer that a factorised module stands in place of, without a wrapper around it.

    Attributes:
        name: in the model.
        kind: of the layer.
        shape: of its weight.
    """

    name: str
    kind: MatrixInShape
    shape: torch.Size
