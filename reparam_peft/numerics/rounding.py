"""Matrices in few bits: rounded to the levels of a grid so that the outputs, and not the numbers, stay near."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .decompositions import Factors, Whole
from .metrics import check_metric, exact, solve
from .pivoting import PivotFactors

DAMPING = 0.01  # of the mean diagonal entry, added to the diagonal: GPTQ's own
SOLVED_AT_ONCE = 192  # rows of a triangular matrix
COLUMNS = 64  # rounded before what they owe is passed on to all columns after them


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


class Feedback:
    """How columns make up for what rounding those before them costs, by a Gram matrix of the inputs. It serves many matrices.

    Args:
        gram: G, shape (in, in), or its diagonal (in,), for which each number is rounded by itself; of any scale.

    Attributes:
        gram: G, float64.
        order: of the columns, that of the largest input first; None where each number is rounded by itself.
        passes_on: float32, shape (in, in): row i says what each later column, in this order, gets of what column i owes.

    Raises:
        ValueError: `gram` is no metric, or holds NaN or inf.
    """

    def __init__(self, gram: Tensor) -> None:
        check_metric("gram", gram, len(gram))
        self.gram = exact(gram)
        self.order: Tensor | None = None
        self.passes_on = torch.empty(0)
        if self.gram.ndim == 2 and self.gram.diagonal().any():
            self.order = self.gram.diagonal().argsort(descending=True)
            root = _inverse_root(self.gram[self.order][:, self.order])
            self.passes_on = root / root.diagonal()[:, None]


def rounded(weight: Tensor, grid: Grid, gram: Tensor | Feedback) -> Rounded:
    """A matrix on a grid that nearly minimises ‖(W − Ŵ) G^½‖_F: what rounding a column costs, the columns after it make up for.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), with the column of the largest input first. The grid is fixed
    beforehand, so that this order costs nothing. Sums are of float32; numbers are of the grid in float64.

    Args:
        weight: W, shape (out, in), any floating dtype.
        grid: of its numbers.
        gram: G, shape (in, in), or its diagonal (in,), for which each number is rounded by itself; of any scale. Or what was
            made of it for an earlier matrix.

    Raises:
        ValueError: `gram` has another shape, or holds NaN or inf.

    >>> grid = Grid(torch.ones(1, 1, dtype=torch.float64), torch.arange(-8.0, 8.0, dtype=torch.float64))
    >>> rounded(torch.tensor([[0.4, 0.4]]), grid, torch.ones(2, 2)).numbers  # of two inputs that are always equal
    tensor([[0., 1.]], dtype=torch.float64)
    """
    W = exact(weight)
    if isinstance(gram, Tensor):
        check_metric("gram", gram, W.shape[1])
    feedback = gram if isinstance(gram, Feedback) else Feedback(gram.to(W.device))
    if feedback.order is None:
        return Rounded(grid.nearest(W), grid)
    # Columns become rows, which lie together in memory, in units of their scales' largest.
    unit = float(grid.scale.amax())
    rows = (W.mT[feedback.order] / unit).float()
    scale = (grid.scale / unit).float().mT.clamp(min=torch.finfo(torch.float32).tiny)
    scales = scale.expand(len(rows), -1) if len(scale) == 1 else scale[feedback.order]
    levels = grid.levels.float()
    middles = (levels[1:] + levels[:-1]) / 2
    is_whole, least, most = bool((levels == levels.round()).all() and (levels.diff() == 1).all()), levels[0], levels[-1]
    chosen = torch.empty(rows.shape, dtype=rows.dtype if is_whole else torch.int32, device=rows.device)  # levels, or indices
    exact_row, in_steps, levels_of_row = (torch.empty_like(rows[0]) for _ in range(3))
    for start in range(0, len(rows), COLUMNS):
        block = slice(start, start + COLUMNS)
        owed, gets = torch.zeros_like(rows[block]), feedback.passes_on[block, block].mT.contiguous()
        passed_on = owed.mT  # zero for those columns of the block that are not rounded yet
        for row, steps, choice, owes, parts in zip(rows[block], scales[block], chosen[block], owed, gets, strict=True):
            torch.addmv(row, passed_on, parts, alpha=-1, out=exact_row)
            if is_whole:
                level = torch.div(exact_row, steps, out=choice).round_().clamp_(least, most)
            else:
                torch.bucketize(torch.div(exact_row, steps, out=in_steps), middles, out_int32=True, out=choice)
                level = torch.index_select(levels, 0, choice, out=levels_of_row)
            torch.addcmul(exact_row, level, steps, value=-1, out=owes)
        rows[block.stop :].addmm_(feedback.passes_on[block, block.stop :].mT, owed, alpha=-1)
    chosen = chosen[feedback.order.argsort()].mT
    return Rounded((chosen.to(grid.levels) if is_whole else grid.levels[chosen.long()]) * grid.scale, grid)


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular U with Uᵀ U = (G + damping)⁻¹, float32."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    # With rows and columns in the reverse order L Lᵀ = G is R Rᵀ = G with an upper triangular R, and U is its inverse.
    R = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return _inverse_of_upper((R / R.diagonal().amax()).float())  # of any scale


def _inverse_of_upper(R: Tensor) -> Tensor:
    """R⁻¹ of an upper triangular matrix, by halves: a third of what solving for the identity takes."""
    n = len(R)
    if n <= SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    half, inverse = n // 2, torch.zeros_like(R)
    inverse[:half, :half], inverse[half:, half:] = _inverse_of_upper(R[:half, :half]), _inverse_of_upper(R[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (R[:half, half:] @ inverse[half:, half:])
    return inverse


def rotated(factors: Factors, seed: int = 0) -> Factors:
    """A R and Rᵀ B with a random rotation R (r, r): the same product, in float64.

    Rows of B decay with the singular values; rotated they are of like size, so that none is lost on a coarse grid.

    >>> A, B = rotated(Factors(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
    >>> torch.allclose(A @ B, torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    True
    """
    A, B = map(exact, factors)
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(len(B), len(B), generator=generator, dtype=torch.float64, device="cpu")).Q.to(B.device)
    return Factors(A @ R, R.mT @ B)


def rounded_pair(
    left: Tensor, right: Tensor, gram: Tensor | Feedback, grid_of: GridOf, rounds_left: bool
) -> tuple[Rounded, Rounded]:
    """Both matrices of a product L M, where M reads the inputs: M̂ = `rounded(M)` in G; L fitted to it; L̂ in M̂ G M̂ᵀ.

    The fit is L M G M̂ᵀ (M̂ G M̂ᵀ)⁻¹, the best for M̂ under any weighing of the outputs.

    Args:
        left: L, shape (out, r), any floating dtype.
        right: M, shape (r, in), likewise.
        gram: G, shape (in, in), or its diagonal (in,); or what was made of it for an earlier matrix.
        grid_of: matrix in float64 → the grid for its numbers.
        rounds_left: whether L is rounded; else it is fitted only.
    """
    L, M = exact(left), exact(right)
    feedback = gram if isinstance(gram, Feedback) else Feedback(gram.to(M.device))
    near = rounded(M, grid_of(M), feedback)
    G = feedback.gram
    weighted = near.numbers * G if G.ndim == 1 else near.numbers @ G
    square = weighted @ near.numbers.mT
    fitted = solve(square, weighted @ M.mT @ L.mT).mT
    return rounded(fitted, grid_of(fitted), square) if rounds_left else Rounded(fitted, None), near


def rounded_factors(
    factors: Factors, gram: Tensor | Feedback, grids: Mapping[str, GridOf]
) -> tuple[Factors, dict[str, Rounded]]:
    """Both factors rounded together, as by `rounded_product`, after a rotation between them."""
    if "B" not in grids:
        return factors, {}
    A, B = rounded_pair(*rotated(factors), gram, grids["B"], "A" in grids)
    return Factors(A.numbers, B.numbers), {"A": A, "B": B}


def rounded_product(
    stored: Factors | PivotFactors | Whole, gram: Tensor | Feedback, grids: Mapping[str, GridOf]
) -> tuple[Factors | PivotFactors | Whole, dict[str, Rounded]]:
    """A product with some of its matrices rounded in the metric of the inputs; and its matrices by name, float64.

    Where the one that reads the inputs is not rounded, none is, and no matrix is named.

    Args:
        stored: factors A and B, the matrices P and K of the pivot form, or a matrix W as it is.
        gram: G, shape (in, in), or its diagonal (in,); or what was made of it for an earlier matrix.
        grids: of those that are rounded, by name: matrix in float64 → the grid for its numbers.
    """
    if isinstance(stored, Factors):
        return rounded_factors(stored, gram, grids)
    if isinstance(stored, Whole):
        if "W" not in grids:
            return stored, {}
        W = exact(stored.W)
        whole = rounded(W, grids["W"](W), gram)
        return Whole(whole.numbers), {"W": whole}
    if "P" not in grids:
        return stored, {}
    K, P = rounded_pair(stored.K, stored.P, gram, grids["P"], "K" in grids)
    return PivotFactors(P.numbers, K.numbers, stored.pivots), {"P": P, "K": K}
