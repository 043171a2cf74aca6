"""`adapter_config.json`, which PEFT reads before it knows whose adapter it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..runtime.json_files import read_json
from .reparam_config import ReparamConfig


class _Fields(dict[str, Any]):
    """The fields of a file that is named where one is missing."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} has no `{key}`, and so is no adapter of PEFT's.")


def reading_adapter_config(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT's `from_json_file`, after what it would stumble over was told with the name of the file."""

    def from_json_file(cls: type[PeftConfig], path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields in `adapter_config.json`, those of this method checked.

        Raises:
            OSError: it cannot be read.
            TypeError: a field has the wrong type.
            ValueError: it holds no JSON object, a method that PEFT does not know, or a field of this method that is wrong.
        """
        path = Path(path_json_file)
        check_adapter_config(path)
        fields = _Fields(original(cls, str(path), **kwargs))
        fields.path = path
        return fields

    return from_json_file


def check_adapter_config(path: Path) -> None:
    """Raise what `from_json_file` says where a file holds no config that PEFT can read."""
    written = read_json(path)
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold the fields of an adapter, got a {type(written).__name__}.")
    method = written.get("peft_type")
    if method is None:
        return
    made_of = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(str(method))
    if made_of is None:
        raise ValueError(f"{path} is of a method that PEFT does not know, {method!r}.")
    if made_of is ReparamConfig:
        names = {field.name for field in dataclasses.fields(ReparamConfig) if field.init}
        try:
            ReparamConfig(**{name: value for name, value in written.items() if name in names})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
