"""What config.json of a standalone checkpoint says of a factorised layer, and the module that is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layers.computed_weight import Replaced
from ..layers.factorized import FactorizedModule, weight_of
from ..layers.kind import LayerKind
from ..layers.kinds import layer_kind
from ..numerics.storage import AS_THE_MODEL, FEW_BITS, FORMS, Storage, narrow_form
from .contents import DAMAGED

SPECIFICATION = {"rank": int, "form": str, "bias": bool}
SIZE = ("out", "in")  # of layers that have lost neurons
BITS, CORRECTION_BITS = "bits", "correction_bits"  # of layers with numbers in few bits


def specification_of(module: FactorizedModule) -> dict[str, Any]:
    """What config.json says of a factorised layer: rank, form, and whether it has a bias.

    Of one that has lost neurons also "out" and "in", the rows and columns that are left; at r = min(out, in) its form is
    "dense". Of one with numbers in few bits also "bits", of a corrected one those of the matrix, and "correction_bits" where
    the factors beside that are in few bits, too.
    """
    specification = {"rank": module.rank, "form": module.form, "bias": module.bias is not None}
    specification |= {} if module.size is None else dict(zip(SIZE, module.size, strict=True))
    widths = dict(module.widths)
    if widths:
        specification[BITS] = widths.pop("Q", 0) or next(iter(widths.values()))
        if module.form == "corrected" and widths:
            specification[CORRECTION_BITS] = next(iter(widths.values()))
    return specification


def check_specification(name: Any, layer: Any) -> None:
    """Raise `ValueError` where config.json says of a layer what `specification_of` does not.

    Args:
        name: of the layer.
        layer: what it says.
    """
    is_mapping = isinstance(layer, Mapping)
    types = SPECIFICATION | (dict.fromkeys(SIZE, int) if is_mapping and not layer.keys().isdisjoint(SIZE) else {})
    types |= {key: int for key in (BITS, CORRECTION_BITS) if is_mapping and key in layer}
    is_typed = is_mapping and layer.keys() == types.keys() and all(type(layer[key]) is types[key] for key in types)
    if not is_typed or not isinstance(name, str) or not name or layer["rank"] < 1 or layer["form"] not in _forms(layer):
        raise ValueError(
            f"layer {name!r} in config.json must have a `rank` of at least 1, a `form` in {FORMS}, a `bias` that is true or "
            "false and, if it has lost neurons, `out` and `in` of at least the rank, where at a rank that is the least of both "
            f"the form is 'dense'; if its numbers are in few bits, `bits` of {FEW_BITS}; got {layer!r}; {DAMAGED}."
        )


def _size(layer: Mapping[str, Any]) -> tuple[int, int] | None:
    """(out, in) of what is left of a layer that has lost neurons; else None."""
    return (layer["out"], layer["in"]) if "out" in layer else None


def _forms(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The forms that a layer may have; none where its rank is too high for its size, or its bits are none."""
    size, bits = _size(layer), layer.get(BITS)
    if not {bits, layer.get(CORRECTION_BITS)} <= {None, *FEW_BITS}:
        return ()
    if CORRECTION_BITS in layer and layer["form"] != "corrected":
        return ()
    forms = FORMS if bits is not None else tuple(form for form in FORMS if form != "corrected")
    if size is None:
        return (*forms, "dense") if bits is not None else forms
    return () if layer["rank"] > min(size) else tuple({narrow_form(layer["rank"], size, form): form for form in forms})


def module_of(name: str, layer: nn.Module, specification: Mapping[str, Any]) -> FactorizedModule:
    """What takes the place of a layer, without memory.

    Raises:
        ValueError: the layer cannot be factorised so.
    """
    size, form, rank = _size(specification), specification["form"], specification["rank"]
    try:
        kind = layer_kind(layer)
        kind.check_size(layer, size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: config.json says that this layer is factorised, but {error}") from error
    shape = kind.shape(layer)
    if rank > min(shape) or (form == "dense" and rank < min(size or shape)):
        raise ValueError(f"{name}: `rank` in config.json is {rank}, of a matrix {shape}; {DAMAGED}.")
    if BITS in specification and not kind.linear:
        raise ValueError(
            f"{name}: config.json says that a {type(layer).__name__} is in few bits, which it cannot be; {DAMAGED}."
        )
    bits, correction_bits = (specification.get(key, AS_THE_MODEL) for key in (BITS, CORRECTION_BITS))
    widths = Storage(*(size or shape), form, bits=bits, correction_bits=correction_bits).widths(rank)
    weight, on_meta = weight_of(layer), torch.device("meta")
    module = kind.factorized(layer, rank, form, specification["bias"], size, on_meta, weight.dtype, widths)
    return mark(module, name, kind, weight.shape)


def mark(module: FactorizedModule, name: str, kind: LayerKind[Any], shape: torch.Size) -> FactorizedModule:
    """Give a factorised module a buffer named as the weight that it replaces, of one element, and return the module.

    A program that does not know the format finds a tensor of another shape there and fails, rather than to make up the
    weights that it misses.

    Args:
        module: the module.
        name: of the layer that it replaces, in the model.
        kind: of that layer.
        shape: of its weight.
    """
    module.mark(Replaced(name, kind, shape))
    for part in module.modules():  # transformers is to initialise nothing in it, nor to look at the marker's shape
        vars(part)["_is_hf_initialized"] = True
    return module
