"""Labels sampled from a model itself, whose log-likelihood has the Fisher information as second moment of its gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .heads import HeldBack

# Of logits that labels are sampled from: copies are of these only. With fewer, the matrix of the head is read more often: 2^20
# take twice the time where there are 49,152 tokens.
NUMBERS_AT_A_TIME = 2**21


def sampled_objective(
    model: nn.Module, output: Any, mask: Tensor | None, first_row: int, seed: int, head: HeldBack | None = None
) -> tuple[Tensor, int]:
    """The summed negative log-likelihood of labels drawn from the model's own distribution, and how many were drawn.

    Logits are categorical along their last dimension, or Bernoulli for multi-label classifiers. What has no logits, and
    a regression, is the mean of a normal distribution of unit variance. Labels are drawn, and gradients computed, for some
    positions at a time, so that beside the logits only their gradient is kept; of logits that are held back, not even they.

    Args:
        model: whose config says what its logits mean.
        output: what it returned.
        mask: which positions count, shape (batch, length); applied where it fits the output.
        first_row: number of the batch's first row in the data.
        seed: with the number of a row, it seeds the draws of that row, so that they do not depend on the batch.
        head: what computes those logits of the output that are held back; None: none are.

    Returns:
        The objective, in nats, a scalar through which gradients flow once; and the number of gradient tokens.

    Raises:
        ValueError: the output holds no floating-point tensor.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    several = problem == "multi_label_classification"
    objectives: list[Tensor] = []
    gradient_tokens = 0
    for number, (prediction, has_logits) in enumerate(predicting_tensors(output)):
        values = prediction if prediction.ndim > 1 else prediction[:, None]
        within = mask if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape else None
        width = values.shape[-1]
        categorical = has_logits and width > 1 and not several and problem != "regression"
        draw = _categorical if categorical else _bernoulli if has_logits and several else _normal
        uniform = _uniform(values, within, 1 if categorical else width, first_row, (seed, number))
        positions = None if within is None else within.to(values.device).flatten().nonzero()[:, 0]
        held_back = head is not None and head.gives(prediction)
        inputs = head.inputs if head is not None and held_back else values
        compute = head.logits if head is not None and held_back else None
        objectives.append(_Likelihood.apply(inputs, positions, uniform, draw, compute, width))
        gradient_tokens += len(uniform)
    return reduce(torch.add, objectives), gradient_tokens


class _Likelihood(torch.autograd.Function):
    """The negative log-likelihood of labels that are drawn here, whose gradient is computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        positions: Tensor | None,
        uniform: Tensor,
        draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        compute: Callable[[Tensor], Tensor] | None,
        width: int,
    ) -> Tensor:
        rows = inputs.detach().flatten(0, -2)
        gradient = torch.zeros_like(rows)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        size = max(1, NUMBERS_AT_A_TIME // width)
        for start in range(0, len(uniform), size):
            some: slice | Tensor = slice(start, start + size) if positions is None else positions[start : start + size]
            x = rows[some]
            if compute is None:
                loss, g = draw(x.float(), uniform[start : start + size])
            else:
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    logits = compute(x)
                loss, g = draw(logits.detach().float(), uniform[start : start + size])
                (g,) = torch.autograd.grad(logits, x, g.to(logits.dtype))
            total += loss
            gradient[some] = g.to(gradient.dtype)
        ctx.gradient = gradient.view(inputs.shape)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(above[0]), None, None, None, None, None


def _categorical(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of a label for each row of logits, summed, and its gradient."""
    p = logits.softmax(-1)
    cumulative = p.cumsum(-1)
    # The sum differs from 1 by rounding; what lies beyond it would be the last label, however improbable.
    labels = torch.searchsorted(cumulative, uniform.float() * cumulative[:, -1:]).clamp(max=logits.shape[-1] - 1)
    loss = -p.gather(1, labels).log().sum()
    return loss, p.scatter_add_(1, labels, p.new_full(labels.shape, -1.0))


def _bernoulli(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of a label for each of the logits, summed, and its gradient."""
    p = logits.sigmoid()
    labels = (uniform < p).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), p - labels


def _normal(mean: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared distance of a draw from its mean, but for what does not depend on the mean; and its gradient."""
    noise = torch.special.ndtri(uniform).to(mean.dtype)
    return -(noise * mean).sum(), -noise


def predicting_tensors(output: Any) -> list[tuple[Tensor, bool]]:
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
        generator = generator_of(*stream, first_row + row)
        rows.append(torch.rand(count, width, generator=generator, dtype=torch.float64, device="cpu"))
    device = values.device
    return torch.cat(rows).clamp(1e-15, 1 - 1e-15).to(device, torch.float32 if device.type == "mps" else torch.float64)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded by all of these numbers; a hash of them, because PyTorch drops all but 32 bits of a seed."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
