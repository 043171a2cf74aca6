"""Fingerprints of models, batches, tensors and settings, by which a run knows what it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_leaves_with_path


def fingerprint_of_model(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and values of all parameters and buffers, adapters included."""
    return _sha256(model.state_dict().items())


def fingerprint_of_base(model: nn.Module) -> str:
    """SHA-256 as of `fingerprint_of_model`, of what is no adapter's: what a compressed model was made of, where it has it."""
    return _sha256((name, tensor) for name, tensor in model.state_dict().items() if not _is_of_adapter(name))


def _is_of_adapter(name: str) -> bool:
    """Whether a tensor, by its name in a state dict, is of an adapter, and not of the base model."""
    return ".reparam_factors." in name or ".modules_to_save." in name


def fingerprint_of_batches(batches: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of all that batches hold, and of where it stands; of what is no tensor, array, number or text, the type."""
    return _sha256(
        (f"{index}{keystr(path)}", leaf)
        for index, batch in enumerate(batches)
        for path, leaf in tree_leaves_with_path(_as_dict(batch))
    )


def _as_dict(value: Any) -> Any:
    """Mappings as dicts, at any depth, such as what tokenizers return, which would count as one leaf each."""
    if isinstance(value, Mapping):
        return {key: _as_dict(part) for key, part in value.items()}
    return [_as_dict(part) for part in value] if type(value) in (list, tuple) else value


def fingerprint_of_config(model: nn.Module) -> str:
    """SHA-256 of the class of a model and of its config, but for where it was loaded from; of the class where it has none."""
    config = getattr(model, "config", None)
    settings = {} if config is None or not hasattr(config, "to_dict") else config.to_dict()
    origin = ("_name_or_path", "_commit_hash", "transformers_version")
    return fingerprint_of_values([type(model).__name__, {key: v for key, v in settings.items() if key not in origin}])


def fingerprint_of_values(values: Any) -> str:
    """SHA-256 of values for JSON; of others, of how they are written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of_rows(rows: Any, most: int = 1000) -> str:
    """SHA-256 of a data set: how many rows it has, and so many of them, evenly spaced, where it is a list or of `datasets`.

    Of `datasets`, rows count as they are stored, since a transform may make other ones each time; and of their format, its type
    and its columns. Rows of another kind of data set may be other ones each time, too, so that its type and its length are all
    that counts.
    """
    import datasets  # which takes a second to import, and is of those who train

    count = len(rows) if hasattr(rows, "__len__") else -1
    kind = [type(rows).__name__, count]
    if isinstance(rows, datasets.Dataset):
        kind += [rows.format["type"], rows.format["columns"]]
        rows = rows.with_format(None)
    kept = isinstance(rows, (list, tuple, datasets.Dataset))
    places = range(0, count, -(-count // most)) if kept and count else ()
    return fingerprint_of_values([*kind, fingerprint_of_batches([{"row": rows[i]} for i in places])])


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    return _sha256(sorted(tensors.items()))


def _sha256(leaves: Iterable[tuple[str, Any]]) -> str:
    total = hashlib.sha256()
    for name, leaf in leaves:
        for part in _parts(name, leaf):
            total.update(part)
    return total.hexdigest()


def _parts(name: str, leaf: Any) -> Iterator[Any]:
    """What is hashed of a value, and of the tensors that it is made of where it is quantized, say."""
    value = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" else leaf
    if isinstance(value, Tensor):
        yield f"{name} {tuple(value.shape)} {value.dtype}".encode()
        if is_traceable_wrapper_subclass(value):
            yield type(value).__name__.encode()
            for inner in value.__tensor_flatten__()[0]:
                yield from _parts(f"{name}.{inner}", getattr(value, inner))
        elif not value.is_meta:  # else it is elsewhere, on a disk say
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    else:
        plain = isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device))
        yield f"{name} {value!r}".encode() if plain else f"{name} {type(value).__name__}".encode()
