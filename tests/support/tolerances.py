"""One table of tolerances, and comparisons that use it."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative deviation, ‖got − expected‖ / ‖expected‖, that rounding in this dtype may cause in a few operations.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal to within the tolerance of `dtype`, by default that of `got`."""
    error = relative_error(got, expected)
    assert error <= TOLERANCE[dtype or got.dtype], f"relative error {error:.3g}"


def assert_equal(got: Tensor, expected: Tensor) -> None:
    """Equal to the bit."""
    assert torch.equal(got, expected)
