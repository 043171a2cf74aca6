"""How well a model predicts: perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..runtime.batches import IGNORED, labels_of
from ..runtime.modules import evaluating, input_device, predicts_next_token, without_cache


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood per predicted token, computed in float32 and summed in float64.

    Positions with label −100 and padding (attention mask 0) do not count. Decoders predict the next token, so labels are
    shifted by one; encoder-decoders and masked language models predict `labels` in place.

    Args:
        model: called as `model(**batch)`, must return `.logits` of shape (batch, length, vocabulary); run in eval mode and put
            back as it was.
        batches: keyword batches with `input_ids`, optionally `attention_mask` and `labels`; without labels the input is
            predicted. Tensors are moved to the model's device.
        progress: whether to show a progress bar.

    Returns:
        The perplexity, ≥ 1.

    Raises:
        ValueError: there is no token to predict, or a batch cannot be used.
        FloatingPointError: logits or loss are NaN or infinite.
    """
    shifts = predicts_next_token(model)
    total, count = 0.0, 0
    bar = tqdm(batches, desc="Evaluating", unit="batch", delay=1, disable=None if progress else True)
    with evaluating(model), bar:
        for index, batch in enumerate(bar):
            if not isinstance(batch, Mapping) or not ("input_ids" in batch or "inputs_embeds" in batch):
                held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise ValueError(f"`batches` must hold dicts with `input_ids`, got {held} as batch {index}.")
            batch = _to_device(batch, model)
            labels = labels_of(batch, shifts, index)
            logits, labels = _predictions(model, batch, labels, shifts)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            if not torch.isfinite(losses):
                raise FloatingPointError(f"the loss of batch {index} is {losses.item()}; the model's logits are not finite.")
            total += losses.double().item()
            count += int((labels != IGNORED).sum())
    if count == 0:
        raise ValueError("`batches` must hold at least one token to predict, got none (empty, exhausted, or all masked).")
    mean = total / count
    if mean > math.log(torch.finfo(torch.float64).max):
        raise FloatingPointError(f"the mean loss of {mean:.3g} nats/token overflows when exponentiated.")
    return math.exp(mean)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The fraction of labels that a model's largest logit is at; for a decoder, of next tokens. Labels of −100 do not count.

    Args:
        model: called as `model(**batch)`, must return `.logits`, with the classes in the last dimension; run in eval mode and
            put back as it was.
        batches: keyword batches with `labels` of the other dimensions of the logits; a decoder predicts its own input without.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: there is no label, or a batch cannot be used.
    """
    shifts = predicts_next_token(model)
    right = count = 0
    with evaluating(model):
        for index, batch in enumerate(batches):
            batch = _to_device(batch, model)
            labels = labels_of(batch, shifts, index)
            logits, labels = _predictions(model, batch, labels, shifts)
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    f"batch {index} has `labels` {tuple(labels.shape)}, and logits {tuple(logits.shape)} need others."
                )
            counts = labels != IGNORED
            right += int((logits.argmax(-1) == labels)[counts].sum())
            count += int(counts.sum())
    if count == 0:
        raise ValueError("`batches` must hold at least one label, got none.")
    return right / count


def _to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch with its tensors where the model takes them."""
    device = input_device(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _predictions(model: nn.Module, batch: Mapping[str, Any], labels: Tensor, shifts: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the labels that they are for."""
    batch = {key: value for key, value in batch.items() if key != "labels" or not shifts}
    logits = model(**without_cache(model, batch)).logits
    return (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)
