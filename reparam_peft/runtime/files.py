"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this block a disk that is full, or a folder that cannot be written, is told with what can be done.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} cannot be written ({error}). See that there is space and that the folder is yours, then call again: "
            "finished blocks and all other files are as they were."
        ) from error


def set_aside(path: Path) -> Path:
    """Where a file is written before it takes its place, in the same folder, so that renaming cannot fail halfway."""
    return path.with_suffix(f"{path.suffix}.tmp")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, then rename, so that whoever reads meanwhile, or after a crash, finds the file whole or as it was.

    Raises:
        OSError: writing failed.
    """
    with writing(path):
        set_aside(path).write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(set_aside(path), path)
