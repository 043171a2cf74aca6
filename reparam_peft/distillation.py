"""The divergence of a student's next-token distribution from a teacher's, and the teacher's logits kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .evaluation import IGNORED

CHUNK = {"cpu": 2**18}  # logits that are looked at at a time: 1 MiB in float32, which stays in a CPU's cache
OTHER_CHUNK = 2**24


@dataclass(frozen=True)
class Sparse:
    """The k likeliest classes of each position, for logits of shape (…, classes).

    Attributes:
        indices: of the classes, shape (…, k), integer.
        log_probabilities: theirs, shape (…, k).
    """

    indices: Tensor
    log_probabilities: Tensor


class _Divergence(torch.autograd.Function):
    """Σ over rows of KL(teacher ‖ student), a few rows at a time: next to the logits only their gradient takes memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | Sparse, rows: Tensor, temperature: float) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32, device=student.device)
        for chunk in rows.split(max(1, CHUNK.get(student.device.type, OTHER_CHUNK) // student.shape[-1])):
            log_q = (student[chunk].to(total.dtype) / temperature).log_softmax(-1)
            log_p = _teacher(teacher, chunk, log_q, temperature)
            p = log_p.exp()
            total += (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()  # 0 · log 0 = 0; NaN stays NaN
            if gradient is not None:
                gradient[chunk] = log_q.exp_().sub_(p).div_(temperature).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def _teacher(teacher: Tensor | Sparse, rows: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the teacher; of the likeliest classes only, with the rest shared out as the student does.

    Then KL over all classes is KL over the k and the rest together: what is not known of the teacher pulls nowhere.
    """
    if isinstance(teacher, Tensor):
        return (teacher[rows].to(log_q) / temperature).log_softmax(-1)
    indices, known = teacher.indices[rows].long(), teacher.log_probabilities[rows].to(log_q)
    rest = (1 - known.exp().sum(-1)).clamp(min=1e-9).log()
    rest_q = (1 - log_q.gather(-1, indices).exp().sum(-1)).clamp(min=1e-9).log()
    return (log_q + (rest - rest_q)[:, None]).scatter(-1, indices, known)


def divergence(student: Tensor, teacher: Tensor | Sparse, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)) over positions (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        student: logits, shape (…, classes); computed in float32 or wider, whatever their dtype.
        teacher: logits of the same shape, or their `Sparse` likeliest.
        mask: which positions count, bool, shape (…); None: all.
        temperature: T > 0; 1 with a sparse teacher.

    Returns:
        A scalar, in nats.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> float(divergence(logits, logits))
    0.0
    """
    classes = student.shape[-1]
    rows = torch.arange(student[..., 0].numel(), device=student.device)
    if mask is not None:
        rows = rows[mask.flatten().to(rows.device)]
    if isinstance(teacher, Sparse):
        teacher = Sparse(*(part.flatten(0, -2).to(student.device) for part in (teacher.indices, teacher.log_probabilities)))
    else:
        teacher = teacher.detach().reshape(-1, classes)
    return temperature**2 * _Divergence.apply(student.reshape(-1, classes), teacher, rows, temperature)


class TeacherCache:
    """The teacher's likeliest classes for each row of data, computed once and kept in a folder, one file per row.

    Args:
        folder: made where it does not exist.
        top_k: k.
        teacher: what tells the teacher from others.
    """

    def __init__(self, folder: str | Path, top_k: int, teacher: str) -> None:
        self.folder, self.top_k, self.teacher = Path(folder), top_k, teacher
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, inputs: Mapping[str, Tensor]) -> Sparse | None:
        """What is known of a batch; None where a row is missing."""
        found = [self._row(inputs, row) for row in range(_rows(inputs))]
        if any(row is None for row in found):
            return None
        single = found[0].indices.ndim == 1  # one distribution for a row, not one for each position
        places = [None if single else _real(inputs, row, _PREDICTED) for row in range(len(found))]
        shape = places[0].shape if places[0] is not None else found[0].indices.shape[:-1]
        indices = torch.zeros(len(found), *shape, found[0].indices.shape[-1], dtype=torch.int32)
        known = torch.full(indices.shape, -torch.inf)
        for row, (part, place) in enumerate(zip(found, places, strict=True)):
            where = (row,) if place is None else (row, place.cpu())
            indices[where], known[where] = part.indices, part.log_probabilities
        return Sparse(indices, known)

    def write(self, inputs: Mapping[str, Tensor], logits: Tensor) -> None:
        """Keep the likeliest classes of a batch's logits (rows, …, classes)."""
        for row in range(_rows(inputs)):
            place = None if logits.ndim == 2 else _real(inputs, row, _PREDICTED)
            chosen = logits[row] if place is None else logits[row][place]
            log_p, indices = chosen.float().log_softmax(-1).topk(min(self.top_k, logits.shape[-1]), sorted=False)
            path = self._path(inputs, row)
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"indices": indices.int().cpu().contiguous(), "log_probabilities": log_p.cpu().contiguous()}, aside)
            os.replace(aside, path)

    def _row(self, inputs: Mapping[str, Tensor], row: int) -> Sparse | None:
        path = self._path(inputs, row)
        try:
            tensors = load_file(path) if path.exists() else {}
        except (SafetensorError, OSError):
            return None  # damaged: computed anew
        return Sparse(**tensors) if tensors.keys() == {"indices", "log_probabilities"} else None

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
                digest.update((where - where[:1]).numpy())
                real = real[place]
            digest.update(f"{name} {tuple(real.shape)} {real.dtype}".encode())
            digest.update(real.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
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
