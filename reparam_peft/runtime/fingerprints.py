"""Fingerprints of models, batches and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path


def fingerprint_of_model(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and values of all parameters and buffers, but for those of adapters."""
    adapters = (".reparam_factors.", ".modules_to_save.")
    return _sha256((n, tensor) for n, tensor in model.state_dict().items() if not any(part in n for part in adapters))


def fingerprint_of_batches(batches: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of all tensors in batches, and of where they stand."""
    leaves = (
        (f"{index}{keystr(path)}", leaf)
        for index, batch in enumerate(batches)
        for path, leaf in tree_leaves_with_path(dict(batch))
    )
    return _sha256((name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor))


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    return _sha256(sorted(tensors.items()))


def _sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
