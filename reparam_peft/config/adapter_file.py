"""`adapter_config.json`, which PEFT reads before it knows whose adapter it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..runtime.json_files import read_json
from .reparam_config import ReparamConfig

# PEFT's own reading, which no more is done to than that what it would stumble over is told beforehand.
_read_by_peft = PeftConfigMixin.from_json_file.__func__


class _Fields(dict[str, Any]):
    """The fields of a file that is named where one is missing."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} has no `{key}`, and so is no adapter of PEFT's.")


def read_adapter_config(cls: type[PeftConfig], path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
    """PEFT's `from_json_file`: the fields in `adapter_config.json`, of this method checked, with errors that name the file.

    Raises:
        OSError: it cannot be read.
        TypeError: a field has the wrong type.
        ValueError: it holds no JSON object, a method that PEFT does not know, or a field of this method that is wrong.
    """
    path = Path(path_json_file)
    written = read_json(path)
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold the fields of an adapter, got a {type(written).__name__}.")
    method = written.get("peft_type")
    if method is not None and not (isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"{path} is of a method that PEFT does not know, {method!r}.")
    if method is not None and PEFT_TYPE_TO_CONFIG_MAPPING[method] is ReparamConfig:
        names = {field.name for field in dataclasses.fields(ReparamConfig) if field.init}
        try:
            ReparamConfig(**{name: value for name, value in written.items() if name in names})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
    fields = _Fields(_read_by_peft(cls, str(path), **kwargs))
    fields.path = path
    return fields
