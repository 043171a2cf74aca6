"""What errors are weighed by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..numerics.metrics import exact

# Part of the input metric that weighs each token by the gradient there, so that the many tokens that matter are not drowned
# out by the few of huge norm. Chosen on held-out calibration text, as shrinkage was; 0.1 to 0.4 differ by less than 1.5 %.
SENSITIVE = 0.1


@dataclass(frozen=True)
class Metrics:
    """What one module's factorisation weighs errors by, and what its loss is predicted in."""

    input: Tensor | None
    output: Tensor | None
    gram: Tensor
    fisher: Tensor | None
    loss_scale: float
    mean: Tensor


def mean_output(W: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """W E[x] + b, float64."""
    wide = exact(W)
    return wide @ mean.to(wide.device) + exact(bias).to(wide.device)


def input_shrinkage(rows: int, size: int) -> float:
    """How far to shrink a Gram matrix of this size out of so many rows: 0.01, more where rows are fewer than 10 · size.

    Between 0.002 and 0.05 the perplexity on held-out calibration text changes by less than 1 %.

    >>> input_shrinkage(24576, 576), input_shrinkage(512, 1024)
    (0.01, 0.2)
    """
    return min(0.5, max(0.01, 0.1 * size / max(rows, 1)))


def output_shrinkage(rows: int, size: int) -> float:
    """Likewise for a Fisher matrix, whose rows are heavy-tailed: 0.1, more where rows are fewer than 5 · size.

    >>> output_shrinkage(24576, 576), output_shrinkage(1024, 1024)
    (0.1, 0.5)
    """
    return min(0.5, max(0.1, 0.5 * size / max(rows, 1)))
