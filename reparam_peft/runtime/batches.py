"""Batches: their labels, their padding, their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most so many rows; whole where its tensors do not agree on the number of rows."""
    lengths = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(lengths) != 1:
        return [batch]
    (rows,) = lengths
    return [
        {key: value[i : i + size] if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()}
        for i in range(0, rows, size)
    ]


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask (sequences, positions), flattened, where an input has these positions; else None."""
    positions = x.shape[:-1] if x.is_floating_point() else x.shape
    fits = mask is not None and tuple(positions) in (tuple(mask.shape), (mask.numel(),))
    return mask.flatten().to(x.device) if fits else None


def padding_masks(batch: Mapping[str, Any], encoder_decoder: bool) -> tuple[Tensor | None, Tensor | None]:
    """What is no padding in the inputs of the model, or of its encoder, and in those of its decoder; None: all."""

    def as_bool(name: str) -> Tensor | None:
        mask = batch.get(name)
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    target = as_bool("decoder_attention_mask") if encoder_decoder else None
    if encoder_decoder and target is None and isinstance(batch.get("labels"), Tensor):
        target = batch["labels"] != -100
    source, target = (None if mask is None or mask.all() else mask for mask in (as_bool("attention_mask"), target))
    return source, target


def rows_in(batch: Mapping[str, Any]) -> int:
    """How many rows (sequences) a batch has: the length of its first tensor; 1 where it has none."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


IGNORED = -100  # transformers' label of positions that do not count


def labels_of(batch: Mapping[str, Tensor], shifts: bool, index: int) -> Tensor:
    """The tokens to predict, with padding ignored."""
    labels = batch.get("labels")
    if labels is None:
        if not shifts or "input_ids" not in batch:
            raise ValueError(f"batch {index} has no `labels`, which a model that does not predict its own input needs.")
        labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    if shifts and mask is not None:
        # Neither padding itself nor the first token after it, which nothing was there to predict from.
        after_padding = F.pad(mask[:, :-1] == 0, (1, 0), value=False)
        labels = labels.masked_fill((mask == 0) | after_padding, IGNORED)
    return labels
