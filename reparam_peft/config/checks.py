"""Checks of a config, and of the weights beside it."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open


def check_weights(path: Path, ranks: dict[str, int], form: str | None) -> None:
    """Raise `ValueError` unless the header of a safetensors file is whole and lists products of these ranks."""
    try:
        with safe_open(path, framework="pt") as file:
            names = {key: key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(file.get_slice(key).get_shape()) for key, name in names.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from error
    expanding = "A.K.weight" if form == "pivot" else "A.weight"
    for name, rank in ranks.items():
        for tensor in ("B.weight", "A.mask" if form == "pivot" else "A.weight"):
            if f"{name}.reparam_factors.{tensor}" not in shapes:
                raise ValueError(f"{path} has no factor {tensor[0]} of {name} ({tensor}); it is damaged or of another model.")
        shape = shapes.get(f"{name}.reparam_factors.{expanding}")  # the pivot form of rank `out` has none
        if shape is not None and (len(shape) < 2 or shape[1] != rank):
            raise ValueError(
                f"{path} has a factor A of shape {shape} for {name}, and its config says rank {rank}; the two do not belong "
                "together."
            )


def check_regex(name: str, pattern: str) -> None:
    """Raise `ValueError` where `re` would fail later, inside PEFT's matching."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{name}` holds {pattern!r}, which is not a valid regular expression: {error}.") from error
