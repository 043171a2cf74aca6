"""Batches: their labels, their padding, their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]

# What models raise for a batch that they do not accept. Where memory is full, that is another matter: `torch.OutOfMemoryError`
# is a RuntimeError, and has to be told apart.
REFUSALS = (TypeError, ValueError, IndexError, KeyError, RuntimeError, AttributeError)
IGNORED = -100  # transformers' label of positions that do not count


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most `size` rows (sequences); whole where its tensors do not agree on the number of rows."""
    lengths = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(lengths) != 1:
        return [batch]
    (rows,) = lengths
    return [
        {key: value[i : i + size] if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()}
        for i in range(0, rows, size)
    ]


def parts_of_tokens(batch: Batch, tokens: int) -> list[Batch]:
    """A batch of token ids in parts of at most so many of them, or of one row; any other batch whole.

    The rows of images, and of positions that are given for each of three axes, need not be those of the tokens.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not len(ids):
        return [batch]
    tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    if any(value.ndim != 2 or value.is_floating_point() for value in tensors):
        return [batch]
    return split_rows(batch, max(1, tokens // max(1, ids.shape[1])))


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask (sequences, positions), flattened, on the device of an input that has these positions; else None: all count.

    Args:
        mask: bool, which positions count; None: all.
        x: hidden states (…, features), or whole numbers such as token ids, one for each position.
    """
    positions = x.shape[:-1] if x.is_floating_point() else x.shape
    if mask is None or tuple(positions) not in (tuple(mask.shape), (mask.numel(),)):
        return None
    return mask.flatten().to(x.device)


def padding_masks(batch: Mapping[str, Any], encoder_decoder: bool) -> tuple[Tensor | None, Tensor | None]:
    """What is no padding in the inputs of the model, or of its encoder, and in those of its decoder; None: all.

    Args:
        batch: keywords of the model.
        encoder_decoder: whether it has a decoder behind an encoder, whose labels then stand in for a mask that is not there.

    Returns:
        Two masks (sequences, positions), bool, True for what counts; the second for a decoder behind an encoder only.
    """

    def as_bool(name: str) -> Tensor | None:
        mask = batch.get(name)
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    source = as_bool("attention_mask")
    target = as_bool("decoder_attention_mask") if encoder_decoder else None
    if encoder_decoder and target is None and isinstance(batch.get("labels"), Tensor):
        target = batch["labels"] != IGNORED
    source, target = (None if mask is None or mask.all() else mask for mask in (source, target))
    return source, target


def rows_in(batch: Mapping[str, Any]) -> int:
    """How many rows (sequences) a batch has: the length of its first tensor; 1 where it has none."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


def labels_of(batch: Mapping[str, Tensor], shifts: bool, index: int) -> Tensor:
    """The tokens to predict, with padding ignored.

    Args:
        batch: keywords of the model, with `labels`, or with `input_ids` that are predicted.
        shifts: whether each position predicts the next token, so that the input itself can be predicted.
        index: number of the batch, for the message of an error.

    Returns:
        Labels (sequences, positions), int64, not yet shifted; `IGNORED` where nothing is predicted.

    Raises:
        ValueError: there are no labels, and the model does not predict its own input.
    """
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
