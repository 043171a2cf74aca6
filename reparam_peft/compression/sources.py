"""What of a checkpoint's folder goes along with a compressed one: looked at before any work, copied without code."""

from __future__ import annotations

import fnmatch
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..arguments import ReparamWarning
from ..runtime.files import write_whole

# What is not copied: weights in any format, what is written anew, and code, which a factorised model has no use for.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ckpt", "*.index.json")
WRITTEN = ("config.json", "generation_config.json", "README.md", "adapter_config.json", ".*")
CODE = ("*.py", "*.pyc", "*.so", "*.pkl", "*.pickle", "__pycache__")
_STAYS = (*WEIGHTS, *WRITTEN, *CODE)


def files_beside_weights(folder: Path) -> list[Path]:
    """The files of a checkpoint that a compressed one needs too, relative to its folder.

    Links are followed within the folder, and into the blobs of a Hub cache. Those that lead elsewhere or nowhere would take
    along what is none of the checkpoint's: they are left out, with a warning.

    Raises:
        ValueError: the folder holds what is neither a file nor a folder, such as a named pipe, which nobody could read.
    """
    folder = folder.resolve()
    left_out: list[str] = []
    files = [path.relative_to(folder) for path in _walk(folder, folder, left_out)]
    if left_out:
        warnings.warn(
            f"{folder}: links that lead out of the folder, or nowhere, are not copied: {', '.join(sorted(left_out))}. Put "
            "files in their place where they are needed.",
            ReparamWarning,
            stacklevel=3,
        )
    return sorted(files)


def _walk(folder: Path, root: Path, left_out: list[str]) -> Iterator[Path]:
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)  # of a Hub cache
    blobs = root if snapshots is None else (snapshots.parent / "blobs").resolve()
    for path in folder.iterdir():
        if path.is_symlink():
            try:
                leads = path.resolve(strict=True)
            except (OSError, RuntimeError):  # nowhere, or round and round
                leads = root.parent
            if not (leads.is_relative_to(root) or leads.is_relative_to(blobs)) or leads.is_dir():
                if not _stays(path, root):
                    left_out.append(str(path.relative_to(root)))
                continue
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder; take it out of the checkpoint.")
        if _stays(path, root):
            continue
        if path.is_dir():
            yield from _walk(path, root, left_out)
        else:
            yield path


def _stays(path: Path, root: Path) -> bool:
    patterns = _STAYS if path.parent == root else (*WEIGHTS, *CODE, ".*")  # modules in folders have configs of their own
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def copy_files(source: Path, files: Iterable[Path], destination: Path) -> None:
    """Copy files, relative to a source, into a destination; what they say of code to load, `auto_map`, is left out."""
    for file in files:
        (destination / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, destination / file)
        if file.name.endswith("_config.json"):
            try:
                fields = json.loads((destination / file).read_bytes())
            except (ValueError, RecursionError):  # which transformers cannot read either
                continue
            if _forget_code(fields):
                write_whole(destination / file, json.dumps(fields, indent=2))


def _forget_code(fields: object) -> bool:
    """Take every `auto_map` out of what a config holds, in place; returns whether there was one."""
    if not isinstance(fields, (dict, list)):
        return False
    own = isinstance(fields, dict) and fields.pop("auto_map", None) is not None
    below = [_forget_code(field) for field in (fields.values() if isinstance(fields, dict) else fields)]
    return own or any(below)
