"""The teacher's likeliest classes, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.batches import IGNORED
from ..runtime.files import save_tensors, writing
from ..runtime.fingerprints import fingerprint_of_tensors
from .losses import Sparse


class TeacherCache:
    """The teacher's likeliest classes for each row of data, computed once and kept in a folder, one file per row.

    Args:
        folder: made where it does not exist.
        top_k: k.
        teacher: what tells the teacher from others.
    """

    def __init__(self, folder: str | Path, top_k: int, teacher: str) -> None:
        self.folder, self.top_k, self.teacher = Path(folder), top_k, teacher
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, inputs: Mapping[str, Tensor]) -> Sparse | None:
        """What is known of a batch; None where a row is missing."""
        rows: list[Sparse] = []
        for row in range(_rows(inputs)):
            kept = self._row(inputs, row)
            if kept is None:
                return None
            rows.append(kept)
        single = rows[0].indices.ndim == 1  # one distribution for a row, not one for each position
        places = [None if single else _real(inputs, row, _PREDICTED) for row in range(len(rows))]
        shape = places[0].shape if places[0] is not None else rows[0].indices.shape[:-1]
        # Files hold positions that are no padding, so that a row may be padded otherwise the next time.
        indices = torch.zeros(len(rows), *shape, rows[0].indices.shape[-1], dtype=torch.int32, device="cpu")
        log_probabilities = torch.full(indices.shape, -torch.inf, device="cpu")
        for row, (kept, place) in enumerate(zip(rows, places, strict=True)):
            where = (row,) if place is None else (row, place.cpu())
            indices[where], log_probabilities[where] = kept.indices, kept.log_probabilities
        return Sparse(indices, log_probabilities)

    def write(self, inputs: Mapping[str, Tensor], logits: Tensor) -> None:
        """Keep the likeliest classes of a batch's logits (rows, …, classes)."""
        for row in range(_rows(inputs)):
            place = None if logits.ndim == 2 else _real(inputs, row, _PREDICTED)
            chosen = logits[row] if place is None else logits[row][place]
            log_p, indices = chosen.float().log_softmax(-1).topk(min(self.top_k, logits.shape[-1]), sorted=False)
            if log_p.isnan().any():
                raise ValueError(
                    "the outputs of the teacher are NaN, of which nothing is learned; look at its weights and dtype."
                )
            tensors = {"indices": indices.int().cpu(), "log_probabilities": log_p.cpu()}
            save_tensors(self._path(inputs, row), tensors, {"sha256": fingerprint_of_tensors(tensors)})

    def _row(self, inputs: Mapping[str, Tensor], row: int) -> Sparse | None:
        """What is kept of a row; None: nothing, or what is not as it was written, and is computed anew."""
        path = self._path(inputs, row)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("indices", "log_probabilities")}
                noted = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError):
            return None
        return Sparse(**tensors) if noted == fingerprint_of_tensors(tensors) else None

    def _path(self, inputs: Mapping[str, Tensor], row: int) -> Path:
        digest = hashlib.sha256(f"{self.teacher} {self.top_k}".encode())
        for name in sorted(inputs):
            value = inputs[name]
            if name.endswith("attention_mask") or not isinstance(value, Tensor) or not value.ndim:
                continue
            mask = {"labels": "labels", "decoder_input_ids": "decoder_attention_mask"}.get(name, "attention_mask")
            place = _real(inputs, row, [mask])
            real = value[row]
            if place is not None and real.shape[:1] == place.shape:
                # Where padding stands does not matter, but gaps do.
                where = place.nonzero().flatten().cpu()
                digest.update((where - where[:1]).numpy().tobytes())
                real = real[place]
            digest.update(f"{name} {tuple(real.shape)} {real.dtype}".encode())
            digest.update(real.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return len(next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim))


# What says which positions logits are for: an encoder-decoder makes its decoder's inputs of the labels.
_PREDICTED = ("labels", "decoder_attention_mask", "attention_mask")


def _real(inputs: Mapping[str, Tensor], row: int, masks: Sequence[str]) -> Tensor | None:
    """Which positions of a row are no padding, bool, by the first of the masks that is there; None: there is none."""
    name = next((name for name in masks if name in inputs), None)
    if name is None or inputs[name].ndim != 2:
        return None
    return inputs[name][row] != IGNORED if name == "labels" else inputs[name][row].bool()
