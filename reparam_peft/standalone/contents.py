"""What the files of a standalone checkpoint hold, compared with the model that is to be filled in, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..layers.factorized import FactorizedModule

DAMAGED = "the checkpoint is damaged, or was changed by hand"
INTEGERS = {torch.uint8: "U8", torch.int8: "I8"}  # in the words of safetensors


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        key: its name there.
        shape: of it.
        dtype: in the words of safetensors.
        file: path.
        converted: whether transformers makes one or more tensors of it and others, of other shapes.
    """

    key: str
    shape: list[int]
    dtype: str
    file: str
    converted: bool = False


def check_files(files: Sequence[str], model: PreTrainedModel, conversions: Sequence[Any], tables: Iterable[str] = ()) -> None:
    """Raise `ValueError` where the files lack a tensor of a factorised layer, hold others, or in another shape or dtype.

    Of the model that was saved, not another one with the same base, no other tensor may be missing either, and none may hold
    integers in place of numbers with a fraction, which transformers would take.

    Args:
        files: of safetensors.
        model: with factorised layers on meta.
        conversions: what transformers will make of names in the files, as `get_model_conversion_mapping` returns it; changed.
    """
    state = model.state_dict()
    in_files = _by_name(files, model, state, conversions)
    where = str(Path(files[0]).parent) if len(files) > 1 else files[0]
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FactorizedModule))
    layers += tuple(f"{name}." for name in tables)
    # Every tensor of the model that was saved, and not of one with another head.
    is_whole = getattr(model.config, "architectures", None) == [type(model).__name__]
    may_lack = [*(model._keys_to_ignore_on_save or []), *(model._keys_to_ignore_on_load_missing or [])]
    for name, value in state.items():
        of_layer = name.startswith(layers)
        stored = in_files.get(name)
        if stored is None:
            needed = of_layer or (is_whole and not any(re.search(pattern, name) for pattern in may_lack))
            if needed and name not in model.all_tied_weights_keys:
                raise ValueError(f"{where}: tensor {name!r} is missing; {DAMAGED}.")
        elif not stored.converted or of_layer:
            _check_tensor(stored, value, of_layer)
    for name, stored in in_files.items():
        if name.startswith(layers) and name not in state:
            raise ValueError(f"{stored.file}: tensor {stored.key!r} does not belong to the factorised layer; {DAMAGED}.")


def _check_tensor(stored: Stored, value: Tensor, of_layer: bool) -> None:
    if of_layer and stored.shape != list(value.shape):
        raise ValueError(f"{stored.file}: tensor {stored.key!r} has shape {stored.shape}, not {list(value.shape)}; {DAMAGED}.")
    if not of_layer and stored.shape == [1] != list(value.shape):  # transformers before 5.23 would take it
        raise ValueError(
            f"{stored.file}: the layer of {stored.key!r} is factorised, but not among `layers` of config.json; {DAMAGED}."
        )
    if "F" not in stored.dtype if value.is_floating_point() else of_layer and stored.dtype != INTEGERS.get(value.dtype):
        raise ValueError(
            f"{stored.file}: tensor {stored.key!r} has dtype {stored.dtype}, where {value.dtype} should be; {DAMAGED}."
        )


def _by_name(
    files: Sequence[str], model: PreTrainedModel, state: dict[str, Tensor], conversions: Sequence[Any]
) -> dict[str, Stored]:
    """What the files hold, by the names that loading gives them in the model."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    in_files = {}
    headers = (header for file in files for header in _headers(file))
    for key, shape, dtype, file in sorted(headers, key=lambda header: dot_natural_key(header[0])):  # as transformers goes
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state:  # which transformers takes for one that has no other name
            plain, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
            name, source = (plain, None) if plain in state or source is None else (name, source)
        first, *others = targets.get(source, [""]) if source is not None else [""]
        for other in [name, *(name.replace(first, target) for target in others)]:
            in_files[other] = Stored(key, shape, dtype, file, source is not None)
    return in_files


def _headers(file: str) -> Iterator[tuple[str, list[int], str, str]]:
    """Name, shape and dtype of each tensor, and the file."""
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  no dict
                tensor = content.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype(), file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}). Download or save it again.") from error
