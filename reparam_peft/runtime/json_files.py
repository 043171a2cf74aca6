"""JSON files, read as data of a stranger: of bounded size and depth, with numbers of 64 bits, and errors that name them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LARGEST = 1 << 30  # bytes; the plan of a model of 70 billion parameters takes a tenth of it
DEEPEST = 32


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, is larger than 1 GiB, or holds no JSON as `parse_json` takes it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that holds JSON.")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST:,} bytes, and no file of reparam_peft.")
    return parse_json(content, path)


def parse_json(content: str | bytes, source: str | Path) -> Any:
    """What a JSON text holds: not nested deeper than 32, with text that can be written as UTF-8, and no number beyond 64 bits;
    NaN and infinities as Python writes them.

    Args:
        content: UTF-8, where it is bytes.
        source: the file that it is of, for the message.

    Raises:
        ValueError: it is no such text.

    >>> parse_json('{"rank": 1e999}', "plan.json")
    Traceback (most recent call last):
    ValueError: plan.json holds no JSON that can be read: a number is too large.
    """
    try:
        value = json.loads(content, parse_int=_int, parse_float=_float)
        _check(value)
    except RecursionError:
        raise ValueError(f"{source} holds no JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{source} holds no JSON that can be read: {str(error).rstrip('.')}.") from error
    return value


def _int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 1 << 63:
        raise ValueError("a number is too large")
    return int(digits)


def _float(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError("a number is too large")
    return float(digits)


def _check(value: Any) -> None:
    """Raise where containers are nested too deeply, or a text holds half of a surrogate pair; level by level."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode()
        if not below:
            return
        level = below
    raise RecursionError
