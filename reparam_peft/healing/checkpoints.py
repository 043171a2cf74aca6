"""Checkpoints that a training goes on from: whole ones only, and those of the same training only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import ReparamWarning
from ..runtime.files import write_whole, writing
from ..runtime.fingerprints import fingerprint_of_tensors
from ..runtime.json_files import read_json

ADAPTER = "adapter"  # in what a training is of: the fingerprint of its factors
MANIFEST = "healing.json"
FORMAT = "reparam_peft healing 1"
LENGTHS = ("max_steps", "num_train_epochs", "minutes")  # which may be more than they were
_WRITERS = ("inline_container", "PytorchStreamWriter")  # in what torch says of a full disk


def described(part: Any) -> Any:
    """An argument that is code, for JSON: the name of the function or class, or of the class that it is of."""
    if isinstance(part, (list, tuple, dict)):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        return {str(key): described(item) for key, item in items}
    if isinstance(part, (bool, int, float, str, type(None))):
        return part
    named = part.func if isinstance(part, partial) else part
    return getattr(named, "__qualname__", type(named).__qualname__)


def note_whole(checkpoint: str | Path, training: Mapping[str, Any]) -> None:
    """Write, as the last file of a checkpoint, what it is of, and the SHA-256 of every file in it.

    Args:
        checkpoint: a folder.
        training: what the result depends on, for JSON.

    Raises:
        OSError: writing failed.
    """
    folder = Path(checkpoint)
    files = {str(path.relative_to(folder)): _sha256(path) for path in _files(folder)}
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "training": training, "files": files}, indent=1))


@contextmanager
def writing_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Within this block a full disk is told with the name of the checkpoint, whose files go, since they take up space.

    A checkpoint that is whole by now stays, and so does the error, which is of what comes after.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        full = not isinstance(error, RuntimeError) or any(name in str(error) for name in _WRITERS)
        if not full or (checkpoint / MANIFEST).exists():
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        with writing(checkpoint):
            raise OSError(str(error)) from error


def last_whole(folder: str | Path, training: Mapping[str, Any]) -> Path | None:
    """The last checkpoint in a folder that is whole; None: there is none.

    Those that are not, since a run was killed while it wrote or deleted them, or since a file is damaged, are passed over with
    a warning.

    Args:
        folder: that a training saves to; it need not exist.
        training: what it is of, for JSON.

    Raises:
        ValueError: a checkpoint is of another training.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            steps[int(step)] = path
    whole = (steps[step] for step in sorted(steps, reverse=True) if _is_whole(steps[step], training))
    return next(whole, None)


def this_or_last_whole(checkpoint: str | Path, training: Mapping[str, Any]) -> Path | None:
    """A checkpoint, or, where it is not whole, the last one beside it that is; warnings and errors as of `last_whole`."""
    checkpoint = Path(os.path.abspath(checkpoint))
    return checkpoint if _is_whole(checkpoint, training, is_chosen=True) else last_whole(checkpoint.parent, training)


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a checkpoint keeps: those that are trained, and all factors."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or ".reparam_factors." in name}


def read_trained(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of parameters, by their names.

    Raises:
        ValueError: it cannot be read, is of other parameters, or holds NaN or infinite values.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); go on from another checkpoint.") from error
    wrong = [name for name in saved if name not in parameters or parameters[name].shape != saved[name].shape]
    if wrong or saved.keys() != parameters.keys():
        name = wrong[0] if wrong else min(parameters.keys() - saved.keys())
        raise ValueError(
            f"{path} does not belong to this model and these arguments: {name} is missing, not trained, or has another shape."
        )
    broken = next((name for name, value in saved.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise ValueError(f"{path}: {broken} holds NaN or infinite values; go on from an earlier checkpoint.")
    return saved


def warn_of_length(checkpoint: Path, training: Mapping[str, Any]) -> None:
    """Warn where a training that goes on from a whole checkpoint is longer than the one that wrote it.

    Args:
        checkpoint: that `last_whole` or `this_or_last_whole` gave.
        training: what was given there.
    """
    noted = read_json(checkpoint / MANIFEST)["training"]
    longer = [f"`{key}` was {noted[key]} and is {training[key]}" for key in LENGTHS if noted.get(key) != training.get(key)]
    if longer:
        warnings.warn(
            f"{checkpoint} is of a shorter training ({' and '.join(longer)}): its learning rate followed another schedule than "
            "that of a training of this length, so that the result differs from that of an undisturbed one.",
            ReparamWarning,
            stacklevel=2,
        )


def _is_whole(checkpoint: Path, training: Mapping[str, Any], is_chosen: bool = False) -> bool:
    """Whether a training can go on from a checkpoint; one that is chosen by its path also where its factors were loaded."""
    fault = _fault(checkpoint, training, is_chosen)
    if fault is not None:
        warnings.warn(f"{checkpoint} is passed over, since it is not whole: {fault}.", ReparamWarning, stacklevel=3)
    return fault is None


def _fault(checkpoint: Path, training: Mapping[str, Any], is_chosen: bool) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files, noted = dict(manifest["files"]), dict(manifest["training"])
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of the format {manifest['format']!r}, and not of {FORMAT!r}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    wanted = json.loads(json.dumps(training))
    for key in sorted({*noted, *wanted}):
        loaded = is_chosen and key == ADAPTER and _saved_adapter(checkpoint) == wanted.get(key)
        if noted.get(key) != wanted.get(key) and not loaded and not _is_longer(key, noted.get(key), wanted.get(key)):
            there, here = (repr(of[key]) if key in of else "none, in another version of this package" for of in (noted, wanted))
            raise ValueError(
                f"{checkpoint} is of a training with another `{key}`: {there}, and this one has {here}. Only `max_steps`, "
                "`num_train_epochs` and `minutes` may be changed, to more than they were. Give another folder, or delete the "
                "checkpoints."
            )
    for name, sha256 in files.items():
        try:
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is no file of it"
            if not _is_inside(name, path, checkpoint):
                return f"{name} leads out of it"
            if _sha256(path) != sha256:
                return f"{name} has been changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _is_longer(key: str, noted: Any, wanted: Any) -> bool:
    """Whether a training goes on for longer than the one that wrote a checkpoint."""
    return key in LENGTHS and isinstance(noted, (int, float)) and isinstance(wanted, (int, float)) and 0 < noted < wanted


def _is_inside(name: str, path: Path, checkpoint: Path) -> bool:
    """Whether a name is relative, and what it leads to within the checkpoint."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and path.resolve().is_relative_to(checkpoint.resolve())


def _saved_adapter(checkpoint: Path) -> str | None:
    """The fingerprint of the adapter in a checkpoint, which may have been loaded to go on from it; None: it has none."""
    path = checkpoint / SAFETENSORS_WEIGHTS_NAME
    try:
        return fingerprint_of_tensors(load_file(path)) if path.is_file() else None
    except (OSError, SafetensorError):
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()
