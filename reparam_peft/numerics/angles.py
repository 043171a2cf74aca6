"""Principal angles between row spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from .metrics import exact


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between the row spaces of two matrices, ascending, in radians; shape (min(r, s),), float64.

    Zeros for a direction that both have; π/2 for one that is orthogonal to all of the other space.

    Args:
        first: shape (r, in).
        second: shape (s, in).

    Raises:
        ValueError: the matrices are not of the same width.

    Source: Björck & Golub 1973; sines where cosines are inaccurate.

    >>> principal_angles(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).item()
    0.785398163397448...
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"two matrices of the same width are needed, got {tuple(first.shape)} and {tuple(second.shape)}.")
    P, Q = (_basis(matrix) for matrix in (first, second))
    P, Q = (P, Q) if P.shape[1] >= Q.shape[1] else (Q, P)
    cosines = torch.linalg.svdvals(P.mT @ Q).clamp(max=1)
    sines = torch.linalg.svdvals(Q - P @ (P.mT @ Q)).flip(0).clamp(max=1)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def _basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis (in, r) of the row space."""
    left, singular, _ = torch.linalg.svd(exact(matrix).mT, full_matrices=False)
    return left[:, singular > singular.max() * max(matrix.shape) * torch.finfo(torch.float64).eps]
