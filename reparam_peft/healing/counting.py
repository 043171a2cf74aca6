"""What counts in a batch: which positions or rows the loss is of, and how many of them a whole step has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.batches import IGNORED, labels_of


class Counts(NamedTuple):
    """How much counts in all batches of a step; of which kind logits are, the logits tell."""

    positions: Tensor
    rows: Tensor


def with_labels(inputs: Mapping[str, Any], shifts: bool) -> dict[str, Any]:
    """A batch with the tokens to predict, where the model predicts its own input (`shifts`) and is given no labels."""
    batch = dict(inputs)
    if "labels" not in batch and shifts and "input_ids" in batch:
        batch["labels"] = labels_of(batch, True, 0)
    return batch


def masks(batch: Mapping[str, Any], shifts: bool, encoder_decoder: bool) -> dict[int, Tensor]:
    """What counts, bool, by number of dimensions: 2 for positions, shape (rows, length), and 1 for rows.

    Labels say it where there are any, else padding. A batch may be of both kinds: a classifier's logits are of rows, and its
    hidden states of positions.
    """
    first = next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    rows = torch.ones(len(first), dtype=torch.bool, device=first.device)
    by_dimensions = {1: rows, 2: rows[:, None]}
    if "input_ids" in batch and not encoder_decoder:
        by_dimensions[2] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    attention = batch.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if attention is not None and attention.ndim == 2:
        by_dimensions[2] = attention.bool()
    labels = batch.get("labels")
    if labels is not None and not labels.is_floating_point():
        labelled = labels != IGNORED
        if shifts:  # a position predicts the token after it, and the last one nothing
            labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)
        by_dimensions[labelled.ndim] = labelled
    return by_dimensions


def counted(
    by_dimensions: Mapping[int, Tensor], outputs: Any, counts: Counts | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What of a batch's logits (or of its last layer) counts, bool, and how much counts in all batches of the step.

    Args:
        by_dimensions: the masks of the batch.
        outputs: the model's.
        counts: of all batches of the step; None: this batch is all there is.
        device: for a mask where none of those fits, and all counts.
    """
    logits = getattr(outputs, "logits", None)
    shape = (outputs[0] if logits is None else logits).shape[:-1]
    mask = by_dimensions.get(len(shape))
    total: Tensor | None
    if mask is not None and mask.shape == shape:
        total = None if counts is None else counts.positions if mask.ndim == 2 else counts.rows
    else:
        # Patches of an image, say: nobody counted them, but there are as many in each row.
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        total = None if counts is None else counts.rows * (mask.numel() // len(mask))
    return mask, (mask.sum() if total is None else total).clamp(min=1)
