"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what can be done where a disk is full or a folder cannot be written.

    Raises:
        OSError
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} cannot be written ({error}). See that there is space and that the folder is yours, then call again: "
            "finished blocks and all other files are as they were."
        ) from error


def set_aside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_suffix(f"{path.suffix}.tmp")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: the file is whole or as it was.

    Raises:
        OSError
    """
    with writing(path):
        set_aside(path).write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(set_aside(path), path)
