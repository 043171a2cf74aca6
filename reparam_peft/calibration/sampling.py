"""Labels sampled from a model itself, whose log-likelihood has the Fisher information as second moment of its gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def sampled_objective(model: nn.Module, output: Any, mask: Tensor | None, first_row: int, seed: int) -> tuple[Tensor, int]:
    """The summed negative log-likelihood of labels drawn from the model's own distribution, and how many were drawn.

    Logits are categorical along their last dimension, or Bernoulli for multi-label classifiers. What has no logits, and
    a regression, is the mean of a normal distribution of unit variance.

    Args:
        model: whose config says what its logits mean.
        output: what it returned.
        mask: which positions count, shape (batch, length); applied where it fits the output.
        first_row: number of the batch's first row in the data.
        seed: with the number of a row, it seeds the draws of that row, so that they do not depend on the batch.

    Returns:
        The objective, in nats, a scalar through which gradients flow; and the number of gradient tokens.

    Raises:
        ValueError: the output holds no floating-point tensor.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    several = problem == "multi_label_classification"
    objectives: list[Tensor] = []
    gradient_tokens = 0
    for number, (prediction, has_logits) in enumerate(_predicting_tensors(output)):
        values = (prediction if prediction.ndim > 1 else prediction[:, None]).float()
        within = mask if mask is not None and values.ndim > 2 and values.shape[:2] == mask.shape else None
        within = None if within is None else within.to(values.device)
        kept = values.flatten(0, -2) if within is None else values[within]
        categorical = has_logits and kept.shape[-1] > 1 and not several and problem != "regression"
        uniform = _uniform(values, within, 1 if categorical else kept.shape[-1], first_row, (seed, number))
        if categorical:
            cumulative = kept.detach().softmax(-1).cumsum_(-1)
            # The sum differs from 1 by rounding; what lies beyond it would be the last label, however improbable.
            labels = torch.searchsorted(cumulative, uniform.float() * cumulative[:, -1:])[:, 0].clamp(max=kept.shape[-1] - 1)
            objectives.append(F.cross_entropy(kept, labels, reduction="sum"))
        elif has_logits and several:
            labels = (uniform < kept.detach().sigmoid()).to(kept.dtype)
            objectives.append(F.binary_cross_entropy_with_logits(kept, labels, reduction="sum"))
        else:
            objectives.append(-(torch.special.ndtri(uniform).to(kept.dtype) * kept).sum())
        gradient_tokens += len(kept)
    return reduce(torch.add, objectives), gradient_tokens


def _predicting_tensors(output: Any) -> list[tuple[Tensor, bool]]:
    """The tensors that a model predicts with, and whether they are logits."""

    def floating(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0

    if floating(output):
        return [(output, False)]
    if isinstance(output, Mapping):
        of_heads = [leaf for key, value in output.items() if key.endswith("logits") for leaf in tree_leaves(value)]
        logits = [value for value in of_heads if floating(value)]
        if logits:
            return [(value, True) for value in logits]
        hidden = [output[key] for key in ("last_hidden_state", "pooler_output") if floating(output.get(key))]
        if hidden:
            return [(value, False) for value in hidden]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in tree_leaves(list(values)):
        if floating(value):
            return [(value, False)]
    raise ValueError(
        f"the model returned a {type(output).__name__} without a floating-point tensor; there is nothing to predict."
    )


def _uniform(values: Tensor, mask: Tensor | None, width: int, first_row: int, stream: tuple[int, int]) -> Tensor:
    """Numbers in (0, 1), shape (positions that count, `width`): row by row, so that they do not depend on the batch."""
    counts = [values[0].numel() // values.shape[-1]] * len(values) if mask is None else mask.sum(1).tolist()
    rows = []
    for row, count in enumerate(counts):
        rows.append(torch.rand(count, width, generator=generator_of(*stream, first_row + row), dtype=torch.float64))
    device = values.device
    return torch.cat(rows).clamp(1e-15, 1 - 1e-15).to(device, torch.float32 if device.type == "mps" else torch.float64)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded by all of these numbers; a hash of them, because PyTorch drops all but 32 bits of a seed."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
