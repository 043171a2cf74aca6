"""The pivot form of a product: r of its rows, and the others as combinations of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .decompositions import Factors
from .metrics import Metric, check_metric, exact

LARGEST_COEFFICIENT = 1.1  # where the exchange of rows stops; closer to 1 takes more exchanges and gains nothing
INDEPENDENT = 1e-5  # of a column's largest number: what others must leave of it
MOST_EXCHANGES = 10  # per row kept; about a tenth is the rule


class PivotFactors(NamedTuple):
    """A matrix W' (out, in) of rank r as r of its own rows: W'[pivots] = P, and the other rows, in order, are K P.

    Attributes:
        P: the pivot rows, shape (r, in).
        K: coefficients, shape (out − r, r), none much larger than 1.
        pivots: indices of the pivot rows, shape (r,), int64, ascending.
    """

    P: Tensor
    K: Tensor
    pivots: Tensor

    def factors(self) -> Factors:
        """A (out, r), which holds the identity in the pivot rows and K in the others, and B = P."""
        out_features, rank = len(self.P) + len(self.K), len(self.P)
        A = torch.empty(out_features, rank, dtype=self.K.dtype, device=self.K.device)
        A[self.pivots] = torch.eye(rank, dtype=A.dtype, device=A.device)
        A[other_rows(self.pivots, out_features)] = self.K
        return Factors(A, self.P)


def pivot(factors: Factors, gram: Tensor | None = None, dtype: torch.dtype | None = None) -> PivotFactors:
    """The product A B in pivot form: r (out + in − r) numbers in place of r (out + in), without loss.

    The form is that of PIFA (Zhao et al. 2025, arXiv:2501.19090). The rows are chosen by LU with partial pivoting of A, or of
    an orthonormal basis of its columns where these are nearly dependent, then exchanged until no coefficient exceeds 1.1 in
    size (maxvol, Goreinov et al. 2010), so that rounding errors of P are not amplified. Where P is rounded to half precision, K
    is fitted anew to the rounded rows:
    it minimises ‖(W'_rest − K P) G^½‖, with a ridge of the size of the rounding.

    Args:
        factors: A (out, r) and B (r, in), r ≤ min(out, in), preferably in higher precision than `dtype`.
        gram: G, shape (in, in) or (in,), for the fit after rounding; None: the identity.
        dtype: of P and K; None: that of B.

    Returns:
        `PivotFactors(P, K, pivots)`, contiguous, on the device of `factors`.

    Raises:
        ValueError: a factor holds NaN or inf, a product overflows `dtype`, or `gram` has the wrong shape.

    >>> A, B = torch.tensor([[1.0], [4.0], [2.0]]), torch.tensor([[1.0, 3.0]])
    >>> pivot(Factors(A, B))
    PivotFactors(P=tensor([[ 4., 12.]]), K=tensor([[0.2500],
            [0.5000]]), pivots=tensor([1]))
    """
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise ValueError("`factors` contain NaN or infinite values.")
    dtype = dtype or factors.B.dtype
    device = factors.B.device
    A, B = exact(factors.A), exact(factors.B)
    pivots, K = _choose_rows(A)
    P = (A[pivots] @ B).to(dtype)
    if dtype.itemsize < 4:
        K = _refit(K, P.double(), A[other_rows(pivots, len(A))] @ B, gram, torch.finfo(dtype).eps)
    K = K.to(dtype)
    if not (torch.isfinite(P).all() and torch.isfinite(K).all()):
        raise ValueError(f"the pivot form overflows {dtype}; scale the weight down, or convert it to a wider dtype.")
    return PivotFactors(P.contiguous().to(device), K.contiguous().to(device), pivots.to(device))


def other_rows(pivots: Tensor, out_features: int) -> Tensor:
    """Indices in [0, out_features) that are not among `pivots`, ascending."""
    others = torch.ones(out_features, dtype=torch.bool, device=pivots.device)
    others[pivots] = False
    return others.nonzero()[:, 0]


def _choose_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a matrix (out, r) that span its rows well, ascending, and the coefficients (out − r, r) of the others in them."""
    rank = A.shape[1]
    LU, swaps, failed = torch.linalg.lu_factor_ex(A)
    # What is left of a column when its turn comes: where it is next to nothing, it is rounding of what was taken away.
    if failed or not (LU.diagonal().abs() > INDEPENDENT * torch.maximum(A.amax(0), -A.amin(0))).all():
        LU, swaps = torch.linalg.lu_factor(torch.linalg.qr(A).Q)
    rows = list(range(len(A)))
    for i, j in enumerate(swaps.tolist()):  # a permutation matrix would take out² numbers
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    K = torch.linalg.solve_triangular(LU[:rank], LU[rank:], upper=False, left=False, unitriangular=True).contiguous()
    chosen, others = (torch.tensor(part, dtype=torch.int64, device=A.device) for part in (rows[:rank], rows[rank:]))
    sizes = torch.empty_like(K)
    for _ in range(MOST_EXCHANGES * rank if len(K) else 0):
        of_rows = torch.abs(K, out=sizes).amax(1)  # many times as fast as to look for the largest of all at once
        i = int(of_rows.argmax())
        if of_rows[i] <= LARGEST_COEFFICIENT:
            break
        j = int(sizes[i].argmax())
        # Row i of the others takes the place of pivot j: a rank-one update of K, and the volume grows by |K_ij|.
        column, row, element = K[:, j].clone(), K[i].clone(), K[i, j].clone()
        column[i] += 1
        row[j] -= 1
        K.addr_(column, row / element, alpha=-1)
        chosen[j], others[i] = others[i].clone(), chosen[j].clone()
    chosen, columns = chosen.sort()
    return chosen, K[others.argsort()][:, columns]


def _refit(K: Tensor, P: Tensor, rest: Tensor, gram: Tensor | None, eps: float) -> Tensor:
    """K + Δ with the Δ that minimises ‖(rest − (K + Δ) P) G^½‖² + ridge ‖Δ‖²."""
    if gram is None:
        gram = torch.ones(P.shape[1], device=P.device)
    check_metric("gram", gram, P.shape[1])
    weighted = Metric(exact(gram).to(P.device)).times(P.mT)
    square = P @ weighted
    ridge = (eps**2 * square.diagonal().mean()).clamp(min=torch.finfo(P.dtype).tiny)  # P may be zero
    square.diagonal().add_(ridge)
    return K + torch.linalg.solve(square, ((rest - K @ P) @ weighted).mT).mT
