"""Metrics: positive semidefinite matrices that weigh errors, given whole or as a diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

# Below this, relative to the largest, a direction of a metric counts as absent: its root is inverted on the others only.
ABSENT = 1e-7
BLOCK = 192  # rows of a triangular or symmetric matrix that are multiplied at a time, without what lies left of them


class Metric:
    """M, shape (n, n), or diag(m) for a vector m of shape (n,); scaled so that its mean diagonal entry is 1.

    Only the direction of a metric matters to a factorisation; the scaling keeps the two factors of like size. What a metric is
    multiplied with is scaled, and not the matrix, which may be the largest of all that there is: it is not copied.

    Args:
        matrix: M or m, positive semidefinite, any floating dtype and scale; not to be changed afterwards.

    Attributes:
        scale: the mean diagonal entry; 0 where the whole metric is zero.
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = exact(matrix)
        self.diagonal = matrix.ndim == 1
        self.scale = float(diagonal(matrix).mean())
        self._unscaled = matrix if self.scale > 0 else torch.zeros_like(matrix)
        self._unit = self.scale if self.scale > 0 else 1.0

    def times(self, X: Tensor) -> Tensor:
        """M X, for X of shape (n, k)."""
        X = X / self._unit
        return self._unscaled[:, None] * X if self.diagonal else self._unscaled @ X

    def quadratic(self, X: Tensor) -> Tensor:
        """Xᵀ M X, for X of shape (n, k), shape (k, k), symmetric to the last bit; of a whole metric half is multiplied."""
        scaled = X / self._unit
        if self.diagonal:
            half = self._unscaled[:, None] / 2 * scaled
        else:
            half = torch.empty_like(X)
            for rows in _blocks(len(X)):
                block, right = self._unscaled[rows, rows], self._unscaled[rows, rows.stop :]
                torch.addmm(block @ scaled[rows], right, scaled[rows.stop :], beta=0.5, out=half[rows])
        product = X.mT @ half
        return product + product.mT

    def norms(self, X: Tensor) -> Tensor:
        """xᵀ M x of each column of X (n, k), shape (k,), in the metric's own scale."""
        return (self.times(X) * X).sum(0).clamp(min=0) * self.scale

    def whiten(self, X: Tensor) -> Tensor:
        """Tᵀ X with T Tᵀ = M."""
        if self.diagonal:
            return self.root[:, None] * X
        if self._cholesky is None:
            return self.root.mT @ X
        return torch.cat([self.root[rows.start :, rows].mT @ X[rows.start :] for rows in _blocks(len(X))])

    def scaled(self) -> Tensor:
        """The matrix, or its diagonal, with a mean diagonal entry of 1; a copy."""
        return self._unscaled / self._unit

    @cached_property
    def narrow(self) -> Tensor:
        """The scaled matrix, or its diagonal, in float32."""
        return self.scaled().float()

    def times_narrow(self, X: Tensor) -> Tensor:
        """M X in float32, for what is not needed more exactly; X in float32."""
        return self.narrow[:, None] * X if self.diagonal else self.narrow @ X

    def unwhiten(self, X: Tensor) -> Tensor:
        """(Tᵀ)⁺ X, the pseudo-inverse of `whiten`."""
        if self.diagonal:
            inverse = torch.where(self.root > ABSENT * self.root.amax(), 1 / self.root, 0)
            return inverse[:, None] * X
        if self._cholesky is not None:
            return torch.linalg.solve_triangular(self.root.mT, X, upper=True)
        return self._inverse_root_times(X)

    def pseudo_inverse_times(self, X: Tensor) -> Tensor:
        """M⁺ X of a whole metric, for X of shape (n, k)."""
        return self._inverse_root_times(self._inverse_root_times(X))

    @property
    def is_definite(self) -> bool:
        """Whether a whole metric can safely be inverted."""
        return self._cholesky is not None

    def _inverse_root_times(self, X: Tensor) -> Tensor:
        """The pseudo-inverse of the symmetric root, times X."""
        roots, Q = self._symmetric
        inverse = torch.where(roots > ABSENT * roots.amax(), 1 / roots, 0)
        return Q @ (inverse[:, None] * (Q.mT @ X))

    @cached_property
    def root(self) -> Tensor:
        """T with T Tᵀ = M: Cholesky's factor, or the symmetric root where M is singular or nearly so."""
        if self.diagonal:
            return self.scaled().clamp(min=0).sqrt()
        if self._cholesky is not None:
            return self._cholesky
        roots, Q = self._symmetric
        return (Q * roots) @ Q.mT

    @cached_property
    def _cholesky(self) -> Tensor | None:
        """The triangular factor, or None where M is not safely positive definite."""
        L, failed = torch.linalg.cholesky_ex(self._unscaled)
        pivots = L.diagonal()
        return None if failed or not pivots.amin() > ABSENT * pivots.amax() else L.div_(self._unit**0.5)

    @cached_property
    def _symmetric(self) -> tuple[Tensor, Tensor]:
        """Square roots of the eigenvalues, and the eigenvectors."""
        eigenvalues, Q = torch.linalg.eigh(self._unscaled)
        return (eigenvalues.clamp(min=0) / self._unit).sqrt(), Q


def _blocks(size: int) -> Iterator[slice]:
    """The rows of a matrix, in blocks."""
    yield from (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def solve(metric: Tensor, right: Tensor) -> Tensor:
    """M⁻¹ R of a metric, or M⁺ R, the solution of least norm, where M is singular or nearly so.

    Args:
        metric: M, shape (n, n), positive semidefinite, float64.
        right: R, shape (n, k), float64.

    >>> solve(torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([0., 0.], dtype=torch.float64)
    """
    scaled = Metric(metric)
    if scaled.is_definite:
        return torch.cholesky_solve(right, scaled.root) / scaled.scale
    return scaled.pseudo_inverse_times(right) / (scaled.scale or 1.0)


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, detached; on the CPU where its device is MPS, which has neither float64 nor `eigh`."""
    return tensor.detach().to(device_of_sums(tensor.device), torch.float64)


def device_of_sums(device: torch.device) -> torch.device:
    """Where float64 numbers of a device's tensors are kept: there, or on the CPU for MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def diagonal(metric: Tensor) -> Tensor:
    """The diagonal of a metric that is given whole or as its diagonal; a view."""
    return metric if metric.ndim == 1 else metric.diagonal()


def check_metric(name: str, metric: Tensor, size: int) -> None:
    """Raise `ValueError` unless a metric is a finite (`size`, `size`) matrix or a vector of length `size`."""
    if tuple(metric.shape) not in ((size, size), (size,)):
        raise ValueError(
            f"`{name}` must have shape ({size}, {size}), or ({size},) for a diagonal, got {tuple(metric.shape)}; it belongs to "
            "another weight."
        )
    if not is_finite(metric):
        raise ValueError(f"`{name}` contains NaN or infinite values.")
    if (diagonal(metric) < 0).any():
        raise ValueError(f"`{name}` must be positive semidefinite, but has a negative diagonal entry.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values; without a copy, in one pass."""
    return all(bool(value.isfinite()) for value in tensor.aminmax()) if tensor.numel() else True


def shrink(metric: Tensor, amount: float) -> Tensor:
    """(1 − α) M + α (tr M / n) I: a metric out of few samples, moved toward one that knows no direction.

    Args:
        metric: M, shape (n, n), or its diagonal, shape (n,).
        amount: α, 0 ≤ α ≤ 1.

    >>> shrink(torch.tensor([1.0, 3.0]), 0.5)
    tensor([1.5000, 2.5000])
    """
    return shrink_in_place(metric.clone(), amount)


def shrink_in_place(metric: Tensor, amount: float) -> Tensor:
    """`shrink` of a metric that nobody else holds: it is changed, and returned."""
    if not 0 <= amount <= 1:
        raise ValueError(f"`amount` must be in [0, 1], got {amount!r}.")
    mean = diagonal(metric).mean()
    diagonal(metric.mul_(1 - amount)).add_(amount * mean)
    return metric
