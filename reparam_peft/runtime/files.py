"""Files and folders that are whole or not there, and a folder that one process works in at a time."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

LOCK = ".reparam.lock"
# Folders with such names are made by this package only, and hold what has not taken its place yet.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.unfinished", re.DOTALL)
_HOUR = 3600.0  # seconds after which what nobody has written to, or locked, is taken for what a killed process has left


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
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


def unfinished(path: str | Path, mode: int = 0o777) -> Path:
    """Make a folder of a unique name, beside a path, in which what shall stand there is made.

    What processes that were killed have left of such folders goes with the first one that a process makes beside it.

    Args:
        path: that it stands beside.
        mode: permissions, of which the umask takes some away.

    Raises:
        OSError: it cannot be made.
    """
    path = Path(os.path.abspath(path))
    _clear_once(path.parent)
    folder = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.unfinished")
    folder.mkdir(mode)
    return folder


class Scratch:
    """A folder that is deleted when the `with` block ends, and that nobody but the user can read.

    What processes that were killed have left of such folders in the same place goes with the first one that another process
    makes there, an hour after the last of it was written.

    Args:
        place: a folder in which it is made.
        name: that it begins with.

    Attributes:
        folder: the folder.
        lock: by which other processes know that it is in use.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, place: str | Path, name: str) -> None:
        self.folder = unfinished(Path(place) / name, mode=0o700)
        try:
            self.lock = lock_folder(self.folder)
        except (OSError, ValueError):
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Within this block a file is made elsewhere, which then takes the place of what is at `path`, whole.

    Whoever reads meanwhile, or after a crash, finds the earlier file or the new one. Where `path` is a link, the link is
    replaced, and what it leads to stays as it is. Permissions follow the umask.

    Args:
        path: of the file, in a folder that exists.

    Yields:
        Where to make it: a path of the same name in a new folder beside it.

    Raises:
        OSError: writing failed. The earlier file is as it was.
        ValueError: something else than a file is there, such as a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced; give the path of a file.")
    with writing(path):
        folder = unfinished(path)
        try:
            aside = folder / path.name
            yield aside
            follow_umask(folder)
            with aside.open("r+b") as file:
                os.fsync(file.fileno())  # else a power cut after the renaming may leave an empty file
            os.replace(aside, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file by `replacing`; text as UTF-8.

    Raises:
        OSError: writing failed. The earlier file is as it was.
    """
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file by `replacing`; the same tensors and metadata give the same bytes.

    Raises:
        OSError: writing failed. The earlier file is as it was.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as aside:
        save_file(plain, aside, metadata=None if metadata is None else dict(metadata))
        if metadata is not None:
            _sort_metadata(aside)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which varies from one call of the library to the next."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(ordered) == size, "both writers of JSON escape the same characters"
        file.seek(8)
        file.write(ordered)


def follow_umask(folder: str | Path) -> None:
    """Give the files in a folder that was made under the umask its permissions; safetensors gives its own to nobody else."""
    mode = stat.S_IMODE(Path(folder).stat().st_mode) & 0o666
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def remove_whole(folder: str | Path) -> None:
    """Delete a folder so that it is there whole or not at all, whenever the process is killed.

    Raises:
        OSError: it cannot be renamed.
    """
    with writing(folder):
        aside = unfinished(folder)
        try:
            os.rename(folder, aside / "removed")
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def lock_folder(folder: str | Path) -> FileLock:
    """Take a folder for this process until the lock is released or the process ends, however it ends.

    Args:
        folder: one that exists.

    Raises:
        ValueError: it is taken, by another process or by another run of this one.
        OSError: it cannot be written.
    """
    return take_lock(Path(folder) / LOCK, folder)


def take_lock(path: Path, what: str | Path) -> FileLock:
    """Take a lock for this process until it is released or the process ends, however it ends.

    Args:
        path: of the lock's file, in a folder that exists.
        what: what is locked, for messages.

    Raises:
        ValueError: it is taken, by another process or by another run of this one.
        OSError: it cannot be written.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and a lock must be a file of its own; delete it.")
    lock = FileLock(path, thread_local=False)
    with writing(path):
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            pass
    raise ValueError(
        f"another run is under way in {what}, by a process that holds {path}; wait for it, or give another folder."
    )


def is_ours(path: Path) -> bool:
    """Whether a file is the lock of a folder, or holds what has not taken its place yet."""
    return path.name == LOCK or _UNFINISHED.fullmatch(path.name) is not None


def clear_litter(folder: str | Path, idle: float = _HOUR) -> None:
    """Delete what processes that were killed have left unfinished in a folder; what cannot be deleted stays.

    Args:
        folder: to look in.
        idle: seconds in which nobody has written to it, or holds a lock in it.
    """
    try:
        paths = list(Path(folder).iterdir())
    except OSError:  # there is none, or it may be written but not listed
        return
    for path in paths:
        if not _UNFINISHED.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            written = max(part.lstat().st_mtime for part in (path, *path.rglob("*")))
            if time.time() - written >= idle:
                lock_folder(path).release()
                shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError):  # it has gone meanwhile, or another process works in it
            continue


@cache
def _clear_once(folder: Path) -> None:
    """`clear_litter`, once for each folder, since folders may hold very many files."""
    clear_litter(folder)
