"""Factorise one matrix: W (out, in) ≈ A B with A (out, r) and B (r, in).

Ours is W ≈ A B. LoRA writes ΔW = B A, so its A is our B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import ABSENT, Metric, check_metric, device_of_sums, exact, is_finite

# An `eigh` of an n × n Gram in precision eps captures less energy than the optimum by up to about 0.025 · eps · n · λ₁
# (measured, worst case: eigenvalues that crowd around the cut). Its subspace is taken where the discarded energy is at least
# 2500 · eps · n · λ₁: then the error of A B is within 1e-5, relatively, of the optimum, with a factor of two to spare.
RESOLVED = 2500
ABSENT_NARROW = 1e-6  # of the largest square of a direction in float32, below which there is nothing but rounding
OVERSAMPLED, ITERATIONS = 8, 3  # of subspace iteration: directions beside those that are wanted, and steps


class Factors(NamedTuple):
    """The two factors of a matrix W ≈ A B.

    Attributes:
        A: shape (out, r).
        B: shape (r, in).
    """

    A: Tensor
    B: Tensor


class Whole(NamedTuple):
    """A matrix that is stored as it is, in place of a product.

    Attributes:
        W: shape (out, in).
    """

    W: Tensor

    def factors(self) -> Factors:
        """The matrix as factors of full rank, of which one is the identity."""
        out_features, in_features = self.W.shape
        identity = torch.eye(min(self.W.shape), dtype=self.W.dtype, device=self.W.device)
        return Factors(identity, self.W) if out_features <= in_features else Factors(self.W, identity)


class Directions(NamedTuple):
    """What the best factors of a matrix of any rank are made of, in a metric G of its inputs and one F of its outputs.

    Attributes:
        values: σ², the squared singular values of F^½ W G^½, falling, shape (k,), k = min(out, in), float64, but for `unit`.
        vectors: its singular vectors, shape (k, k), in the dtype of W or float32: left ones, or right ones where W is tall.
        unit: what values are multiplied by to be in the scale of W, G and F.
        needs_output_gram: whether factors are made with F, too; else without, so that it need not be at hand.
    """

    values: Tensor
    vectors: Tensor
    unit: float
    needs_output_gram: bool = True

    @property
    def losses(self) -> Tensor:
        """½ σ², as by `direction_losses`, shape (k,)."""
        return self.values * (self.unit / 2)


class Corrected(NamedTuple):
    """A matrix in few bits and a product beside it that makes up for what the rounding lost: Q + A B.

    Attributes:
        Q: shape (out, in).
        A: shape (out, r).
        B: shape (r, in).
    """

    Q: Tensor
    A: Tensor
    B: Tensor

    def factors(self) -> Factors:
        """The sum as factors of full rank, of which one is the identity."""
        return Whole(self.Q + self.A @ self.B).factors()


def check_rank(rank: int, shape: torch.Size | tuple[int, int]) -> None:
    """Raise `ValueError` unless 1 ≤ `rank` ≤ min(`shape`), and `TypeError` unless it is an int."""
    limit = min(shape)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`rank` must be an int, got {rank!r}.")
    if not 1 <= rank <= limit:
        raise ValueError(f"`rank` must be in [1, {limit}] for a weight of shape {tuple(shape)}, got {rank}.")


def check_matrix(weight: Tensor) -> None:
    """Raise unless `weight` is a finite floating-point matrix that holds data."""
    if weight.ndim != 2:
        raise ValueError(f"`weight` must be a matrix, got {weight.ndim} dimensions of shape {tuple(weight.shape)}.")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"`weight` must have a floating dtype, got {weight.dtype}; dequantise it first.")
    if weight.device.type == "meta":
        raise ValueError("`weight` is on the meta device and holds no data; load the weights before factorising them.")
    if not is_finite(weight):
        raise ValueError("`weight` contains NaN or infinite values; repair or exclude it.")


def factorize(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    directions: Directions | None = None,
) -> Factors:
    """Rank-`rank` factors with the least error: of the weight or, with metrics, of the outputs on the calibration rows.

    Without metrics minimises ‖W − A B‖_F (Eckart & Young 1936): A = U_r, the leading left singular vectors, and B = U_rᵀ W.
    Where W has fewer columns than rows, A = W V_r and B = V_rᵀ instead, so that only the smaller Gram matrix is decomposed.

    With metrics minimises ‖F^½ (W − A B) G^½‖_F. Let S Sᵀ = G and T Tᵀ = F, and U_r the leading left singular vectors of
    Tᵀ W S: then A = T⁻ᵀ U_r and B = U_rᵀ Tᵀ W. G is never inverted, so that a singular one is no special case; of a singular F
    the pseudo-inverse is taken. G alone is the whitening of SVD-LLM (Wang et al. 2024, arXiv:2403.07378) as Swift-SVD
    computes it (arXiv:2604.01609); both together are KFAC-SVD. A vector is a diagonal metric: squared scales of the input
    channels are ASVD (Yuan et al. 2023, arXiv:2312.05821), the Fisher information of each output FWSVD (Hsu et al. 2022,
    arXiv:2207.00112).

    At full rank one factor is the identity and the other is W: the original matrix to the last bit.

    Accuracy: with metrics, all is float64, and singular vectors are rounded to the dtype of `weight`, to float32 at least: with
    `directions`, that are known, the factors are the same to the last bit. Without metrics, U_r comes from `eigh` of the Gram
    matrix of the smaller side n, accumulated in float64. A Gram squares the condition number: directions whose singular value
    is below about 1e-7 σ₁ are not resolved. Therefore
    (1) `eigh` runs in float32, at half the cost, where the discarded energy Σ_{i>r} σ_i² is at least 3e-4 · n · σ₁²;
    (2) otherwise in float64, where it is at least 6e-13 · n · σ₁²;
    (3) otherwise, for matrices that are nearly of rank `rank`, `torch.linalg.svd` runs in float64.
    In each case ‖W − A B‖_F is within a relative 1e-5 of the optimum, up to the one rounding of A and B to the dtype of
    `weight`.

    Args:
        weight: W, shape (out, in), any floating dtype; half precision is decomposed in float32 or float64.
        rank: r, with 1 ≤ r ≤ min(out, in).
        gram: G = XᵀX, shape (in, in), or a diagonal, shape (in,); positive semidefinite, of any scale. None: the identity.
        output_gram: F = E[g gᵀ] of the gradients at the outputs, shape (out, out) or (out,); likewise.
        directions: what `find_directions` finds with this weight and these metrics, of which `output_gram` may be left out
            where they say so; None: they are found here.

    Returns:
        `Factors(A, B)`, shapes (out, r) and (r, in), contiguous, with the dtype and device of `weight`.

    Raises:
        ValueError: `rank` is out of range; `weight` is no matrix, holds no data, or holds NaN or inf; a metric has the wrong
            shape or holds NaN or inf; or values are so near the largest of the dtype that the factors overflow.
        TypeError: `rank` is no int, or `weight` has no floating dtype.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> A, B = factorize(W, 1)
    >>> (A @ B).abs()
    tensor([[3., 0.],
            [0., 0.],
            [0., 0.]])
    """
    check_matrix(weight)
    check_rank(rank, weight.shape)
    metrics = weighing(weight, gram, output_gram)
    out_features, in_features = weight.shape
    if rank == min(weight.shape):
        return Whole(weight.detach().clone(memory_format=torch.contiguous_format)).factors()
    stored = _empty_factors(weight, rank)
    if gram is not None or output_gram is not None:
        found = _find_directions(weight, *metrics) if directions is None else directions
        return _round_into(stored, *_nested_factors(weight, *metrics, found, rank))
    wide = weight.detach() if out_features <= in_features else weight.detach().mT
    basis = _leading_left_singular_vectors(wide, rank)
    projected = basis.mT @ wide.to(basis)
    A, B = (basis, projected) if out_features <= in_features else (projected.mT, basis.mT)
    return _round_into(stored, A, B)


def find_directions(weight: Tensor, gram: Tensor, output_gram: Tensor) -> Directions:
    """The directions of a matrix in metrics: they tell what each rank costs, and spare `factorize` most of its work.

    Args:
        weight: W, shape (out, in).
        gram: G, shape (in, in) or (in,).
        output_gram: F, shape (out, out) or (out,).

    Raises:
        ValueError, TypeError: as for `factorize`.

    >>> find_directions(torch.eye(2), torch.tensor([1.0, 4.0]), torch.ones(2)).losses
    tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    check_matrix(weight)
    return _find_directions(weight, *weighing(weight, gram, output_gram))


def direction_losses(
    weight: Tensor,
    gram: Tensor,
    fisher: Tensor,
    input_metric: Tensor | None = None,
    output_metric: Tensor | None = None,
) -> Tensor:
    """What dropping each direction of a factorisation is predicted to add to the loss.

    Direction i of the factors A B = W of full rank costs q_i = ½ (a_iᵀ F a_i) (b_i G b_iᵀ), with a_i a column of A and b_i a
    row of B: the second-order increase, where F is the Fisher information of the outputs, but for terms between directions.
    Where the factorisation minimises this very error those vanish, and q_i = ½ σ_i² with σ_i the singular values of
    F^½ W G^½ (KFAC-SVD; with G alone as the metric, the Gauss–Newton form of ZS-SVD, arXiv:2602.02848).

    Args:
        weight: W, shape (out, in).
        gram: G, mean over the tokens, shape (in, in) or (in,), in which the cost is measured.
        fisher: F, mean over the tokens, shape (out, out) or (out,), in which the cost is measured.
        input_metric: what `factorize` gets as `gram`; None: the identity.
        output_metric: what `factorize` gets as `output_gram`; None: the identity.

    Returns:
        q, shape (min(out, in),), float64, ≥ 0, in nats per token where F is of the loss in nats: rank r keeps the first r.

    Raises:
        ValueError, TypeError: as for `factorize`.
    """
    check_matrix(weight)
    measured = weighing(weight, gram, fisher)
    if input_metric is gram and output_metric is fisher:
        W, largest = scaled(weight)
        energies = torch.linalg.eigvalsh(_square_of_directions(W, *measured))
        return energies.flip(0).clamp(min=0) * (largest**2 * measured[0].scale * measured[1].scale / 2)
    metrics = weighing(weight, input_metric, output_metric)
    A, B = _nested_factors(weight, *metrics, _find_directions(weight, *metrics), min(weight.shape))
    return measured[1].norms(A) * measured[0].norms(B.mT) / 2


def random_factors(weight: Tensor, rank: int) -> Factors:
    """Gaussian factors whose product has, on average, the Frobenius norm of `weight`: a start that is not the identity.

    Args:
        weight: W, shape (out, in), any floating dtype; only its norm, shape, dtype and device are used.
        rank: r, with 1 ≤ r ≤ min(out, in).

    Returns:
        `Factors(A, B)`, shapes (out, r) and (r, in), from torch's global generator.

    Raises:
        ValueError, TypeError: as for `factorize`.
    """
    check_matrix(weight)
    check_rank(rank, weight.shape)
    out_features, in_features = weight.shape
    # E‖A B‖_F² = out · in · r · std(A)² · std(B)²; both factors get the same standard deviation.
    W, largest = scaled(weight)
    std = (float(W.square().mean().sqrt()) * largest) ** 0.5 / rank**0.25
    device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
    A = torch.randn(out_features, rank, device=device, dtype=wide) * std
    B = torch.randn(rank, in_features, device=device, dtype=wide) * std
    return _round_into(_empty_factors(weight, rank), A, B)


def _empty_factors(weight: Tensor, rank: int) -> Factors:
    """Memory for factors with the dtype and device of `weight`.

    It is taken before the memory of intermediate results, which else leaves holes between the factors of many matrices.
    """
    out_features, in_features = weight.shape
    return Factors(weight.new_empty(out_features, rank), weight.new_empty(rank, in_features))


def _round_into(stored: Factors, A: Tensor, B: Tensor) -> Factors:
    """Copy A and B into `stored`, rounding them to its dtype."""
    for kept, factor in zip(stored, narrowed(Factors(A, B), stored.A.dtype), strict=True):
        kept.copy_(factor)
    return stored


def narrowed(factors: Factors, dtype: torch.dtype) -> Factors:
    """The factors in a dtype; where one would overflow, powers of two move from it to the other.

    Raises:
        ValueError: the factors hold NaN or inf, or both are too large for the dtype.

    >>> A, B = narrowed(Factors(torch.full((1, 1), 2.0**20), torch.full((1, 1), 2.0**-6)), torch.float16)
    >>> A.item(), B.item()
    (128.0, 128.0)
    """
    rounded = Factors(*(factor.to(dtype) for factor in factors))
    if all(factor.isfinite().all() for factor in rounded):
        return rounded
    left, right = (factor.abs().amax(dim).clamp(min=1e-300) for factor, dim in zip(map(exact, factors), (0, 1), strict=True))
    # Of each direction, so that both have the same largest entry, to within a factor of two; exact but for the rounding.
    powers = torch.exp2(((right / left).log2() / 2).round()).to(factors.A)
    rounded = Factors((factors.A * powers).to(dtype), (factors.B / powers[:, None]).to(dtype))
    if not all(factor.isfinite().all() for factor in rounded):
        raise ValueError(f"the factors of `weight` overflow {dtype}; scale it down, or convert it to a wider dtype.")
    return rounded


def weighing(weight: Tensor, gram: Tensor | None, output_gram: Tensor | None) -> tuple[Metric, Metric]:
    """G and F, checked; the identity, as a diagonal, where there is none."""
    out_features, in_features = weight.shape

    def checked(name: str, metric: Tensor | None, size: int) -> Metric:
        matrix = torch.ones(size, device=weight.device) if metric is None else metric
        check_metric(name, matrix, size)
        return Metric(exact(matrix).to(device_of_sums(weight.device)))

    return checked("gram", gram, in_features), checked("output_gram", output_gram, out_features)


def _find_directions(weight: Tensor, gram: Metric, output_gram: Metric) -> Directions:
    W, largest = scaled(weight)
    values, vectors = torch.linalg.eigh(_square_of_directions(W, gram, output_gram))
    rounded = vectors.flip(1).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    unit = largest**2 * gram.scale * output_gram.scale
    return Directions(values.flip(0).clamp(min=0), rounded, unit, not _is_of_inputs(W, gram))


def _is_of_inputs(W: Tensor, gram: Metric) -> bool:
    """Whether factors are made from right singular vectors, B = Σ Vᵀ S⁻¹ and A = W G Bᵀ Σ⁻², for which G must be definite."""
    return W.shape[0] > W.shape[1] and not gram.diagonal and gram.is_definite


def _nested_factors(
    weight: Tensor, gram: Metric, output_gram: Metric, directions: Directions, rank: int
) -> tuple[Tensor, Tensor]:
    """A (out, r) and B (r, in), float64, the best factors of rank r and the first columns and rows of those of higher ranks."""
    W, largest = scaled(weight)
    vectors = exact(directions.vectors[:, :rank])
    if len(W) <= W.shape[1]:
        whitened = output_gram.whiten(W)
        return output_gram.unwhiten(vectors), vectors.mT @ whitened * largest
    if _is_of_inputs(W, gram):
        sigma = directions.values.sqrt()
        sigma = sigma.clamp(min=ABSENT * sigma[0]).clamp(min=torch.finfo(sigma.dtype).tiny)[:rank]
        B = gram.unwhiten(vectors).mT
        return W @ gram.times(B.mT) / sigma, sigma[:, None] * B * largest
    # M v_i = σ_i u_i. QR, largest first, makes them orthonormal also where σ_i is lost in rounding.
    whitened = output_gram.whiten(W)
    U = torch.linalg.qr(gram.whiten(whitened.mT).mT @ vectors).Q
    return output_gram.unwhiten(U), U.mT @ whitened * largest


def leading_factors(weight: Tensor, rank: int, gram: Metric, output_gram: Metric) -> Factors:
    """Factors of a low rank that nearly minimise ‖F^½ (W − A B) G^½‖_F, at a cost that grows with the rank.

    Subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4) in float32, from a fixed start, on W G Wᵀ F, for
    which no root of a metric is needed. The first columns and rows are nearly the factors of lower ranks.

    Args:
        weight: W, shape (out, in), float64.
        rank: r, at most min(out, in).
        gram: G of the inputs.
        output_gram: F of the outputs.
    """
    W, generator = weight.float(), torch.Generator().manual_seed(0)
    subspace = torch.randn(W.shape[1], min(rank + OVERSAMPLED, *W.shape), generator=generator, device="cpu").to(W.device)
    for _ in range(ITERATIONS):
        X = _orthonormal(W @ gram.times_narrow(subspace), output_gram)
        subspace = W.mT @ output_gram.times_narrow(X)
    X = _orthonormal(W @ gram.times_narrow(subspace), output_gram)
    rows = output_gram.times_narrow(X).mT @ W  # X Xᵀ F W is W's part in the subspace
    U = torch.linalg.eigh((rows @ gram.times_narrow(rows.mT)).double()).eigenvectors.flip(1)[:, :rank]
    return Factors(X.double() @ U, U.mT @ rows.double())


def _orthonormal(columns: Tensor, metric: Metric) -> Tensor:
    """Columns of the same span, X with Xᵀ M X = I, float32; zero where the metric knows nothing of a direction."""
    Q = torch.linalg.qr(columns).Q
    squares, V = torch.linalg.eigh((Q.mT @ metric.times_narrow(Q)).double())
    inverse = torch.where(squares > ABSENT_NARROW * squares[-1], squares.clamp(min=0).rsqrt(), 0)
    return Q @ (V * inverse).to(Q)


def _square_of_directions(W: Tensor, gram: Metric, output_gram: Metric) -> Tensor:
    """With M = Tᵀ W S the smaller of Mᵀ M and M Mᵀ, whose eigenvalues are σ²; it needs no root of the larger metric."""
    if W.shape[0] <= W.shape[1]:
        return gram.quadratic(output_gram.whiten(W).mT)
    square = gram.whiten(gram.whiten(output_gram.quadratic(W)).mT)
    return (square + square.mT) / 2


def scaled(weight: Tensor) -> tuple[Tensor, float]:
    """`weight` in float64 with a largest entry of 1, which keeps products of very large weights finite; and that entry."""
    W = weight.detach().to(device_of_sums(weight.device), torch.float64, copy=True)
    low, high = (float(value) for value in W.aminmax())
    largest = max(-low, high, torch.finfo(torch.float64).tiny)
    return W.div_(largest), largest


def _leading_left_singular_vectors(wide: Tensor, rank: int) -> Tensor:
    """U_r, shape (m, r), of a matrix with m ≤ n and r < m; float32 or float64, as `factorize` says."""
    W, _ = scaled(wide)  # which keeps the Gram of very large or very small weights within the range of float32
    gram = W @ W.mT
    for dtype in [torch.float32, torch.float64] if wide.dtype != torch.float64 else [torch.float64]:
        eigenvalues, U = torch.linalg.eigh(gram.to(dtype))
        # Eigenvalues below zero are rounding; they come in ascending order.
        discarded = eigenvalues[:-rank].double().clamp(min=0).sum()
        if discarded >= RESOLVED * torch.finfo(dtype).eps * len(gram) * eigenvalues[-1].double():
            return U[:, -rank:].flip(1)
    return torch.linalg.svd(W, full_matrices=False).U[:, :rank]


def truncate(factors: Factors, rank: int) -> Factors:
    """The best factors of lower rank: those of the truncated SVD of A B (Eckart & Young 1936), in float64.

    With A = Q_A R_A and Bᵀ = Q_B R_B, the SVD is that of R_A R_Bᵀ (r, r): A B is never formed, and the cost is
    O((out + in) r²).

    Args:
        factors: A (out, r) and B (r, in), r ≤ min(out, in), any floating dtype.
        rank: of the result, 1 ≤ rank ≤ r.

    Returns:
        `Factors`, shapes (out, rank) and (rank, in); the one with fewer rows or columns is orthonormal, as in `factorize`.

    Raises:
        ValueError: `rank` is out of range, or a factor holds NaN or inf.

    >>> A, B = truncate(Factors(torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])), 1)
    >>> (A @ B).abs()
    tensor([[3., 0., 0.],
            [0., 0., 0.]], dtype=torch.float64)
    """
    check_rank(rank, (len(factors.B), len(factors.B)))
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise ValueError("the factors contain NaN or infinite values; go back to a checkpoint from before.")
    A, B = (exact(factor) for factor in factors)
    (left, R_A), (right, R_B) = torch.linalg.qr(A), torch.linalg.qr(B.mT)
    U, values, Vh = torch.linalg.svd(R_A @ R_B.mT)
    U, V = left @ U[:, :rank], right @ Vh[:rank].mT
    return Factors(U, values[:rank, None] * V.mT) if len(A) <= B.shape[1] else Factors(U * values[:rank], V.mT)
