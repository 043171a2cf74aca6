"""Matrices in few bits: rounded to the levels of a grid so that the outputs, and not the numbers, stay near."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .decompositions import Factors
from .metrics import check_metric, exact, solve

DAMPING = 0.01  # of the mean diagonal entry, added to the diagonal: GPTQ's own
COLUMNS = 128  # rounded before what they owe is passed on to all columns after them: GPTQ's own


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix (out, in) may hold: a scale times one of some levels.

    Attributes:
        scale: positive, float64, shape (out, in) or one that expands to it.
        levels: ascending, float64, shape (levels,).
    """

    scale: Tensor
    levels: Tensor

    def indices(self, values: Tensor) -> Tensor:
        """Of the nearest level to each number, int64, in the shape of `values`.

        >>> grid = Grid(torch.tensor([[2.0]]), torch.tensor([-1.0, 0.0, 1.0]))
        >>> grid.indices(torch.tensor([[-9.0, 0.9, 1.1]]))
        tensor([[0, 1, 2]])
        """
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize((values / self.scale).contiguous(), middles)

    def columns(self, indices: Tensor | slice) -> Grid:
        """The grid of some columns."""
        return self if self.scale.shape[1] == 1 else Grid(self.scale[:, indices], self.levels)

    def nearest(self, values: Tensor) -> Tensor:
        """The numbers of the grid that are nearest to `values`, of the same shape."""
        return self.levels[self.indices(values)] * self.scale


GridOf: TypeAlias = Callable[[Tensor], Grid]


class Rounded(NamedTuple):
    """A matrix, and the grid that it is on.

    Attributes:
        numbers: shape (out, in), float64.
        grid: None where the matrix is not rounded.
    """

    numbers: Tensor
    grid: Grid | None


def rounded(weight: Tensor, grid: Grid, gram: Tensor) -> Rounded:
    """A matrix on a grid that nearly minimises ‖(W − Ŵ) G^½‖_F: what rounding a column costs, the columns after it make up for.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), with the column of the largest input first. The grid is fixed
    beforehand, so that this order costs nothing.

    Args:
        weight: W, shape (out, in), any floating dtype.
        grid: of its numbers.
        gram: G, shape (in, in), or its diagonal (in,), for which each number is rounded by itself; of any scale.

    Raises:
        ValueError: `gram` has another shape, or holds NaN or inf.

    >>> grid = Grid(torch.ones(1, 1, dtype=torch.float64), torch.arange(-8.0, 8.0, dtype=torch.float64))
    >>> rounded(torch.tensor([[0.4, 0.4]]), grid, torch.ones(2, 2)).numbers  # of two inputs that are always equal
    tensor([[0., 1.]], dtype=torch.float64)
    """
    W = exact(weight)
    check_metric("gram", gram, W.shape[1])
    G = exact(gram).to(W.device)
    if G.ndim == 1 or not G.diagonal().any():
        return Rounded(grid.nearest(W), grid)
    order = G.diagonal().argsort(descending=True)
    passes_on = _inverse_root(G[order][:, order])
    W, ordered, Q = W[:, order].clone(), grid.columns(order), torch.empty_like(W)
    for start in range(0, W.shape[1], COLUMNS):
        end = min(start + COLUMNS, W.shape[1])
        owed = torch.empty(len(W), end - start, dtype=W.dtype, device=W.device)
        for column in range(start, end):
            here = slice(column, column + 1)
            Q[:, here] = ordered.columns(here).nearest(W[:, here])
            owed[:, column - start] = (W[:, column] - Q[:, column]) / passes_on[column, column]
            W[:, column:end] -= owed[:, column - start, None] * passes_on[column, column:end]
        W[:, end:] -= owed @ passes_on[start:end, end:]
    return Rounded(Q[:, order.argsort()], grid)


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular U with Uᵀ U = (G + damping)⁻¹."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)


def rotated(factors: Factors, seed: int = 0) -> Factors:
    """A R and Rᵀ B with a random rotation R (r, r): the same product, in float64.

    Rows of B decay with the singular values; rotated they are of like size, so that none is lost on a coarse grid.

    >>> A, B = rotated(Factors(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
    >>> torch.allclose(A @ B, torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    True
    """
    A, B = map(exact, factors)
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(len(B), len(B), generator=generator, dtype=torch.float64)).Q.to(B.device)
    return Factors(A @ R, R.mT @ B)


def rounded_pair(left: Tensor, right: Tensor, gram: Tensor, grid_of: GridOf, rounds_left: bool) -> tuple[Rounded, Rounded]:
    """Both matrices of a product L M, where M reads the inputs: M̂ = `rounded(M)` in G; L fitted to it; L̂ in M̂ G M̂ᵀ.

    The fit is L M G M̂ᵀ (M̂ G M̂ᵀ)⁻¹, the best for M̂ under any weighing of the outputs.

    Args:
        left: L, shape (out, r), any floating dtype.
        right: M, shape (r, in), likewise.
        gram: G, shape (in, in), float64.
        grid_of: matrix in float64 → the grid for its numbers.
        rounds_left: whether L is rounded; else it is fitted only.
    """
    L, M = exact(left), exact(right)
    near = rounded(M, grid_of(M), gram)
    weighted = near.numbers @ gram
    square = weighted @ near.numbers.mT
    fitted = solve(square, weighted @ M.mT @ L.mT).mT
    return rounded(fitted, grid_of(fitted), square) if rounds_left else Rounded(fitted, None), near
