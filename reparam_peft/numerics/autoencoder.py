"""A linear autoencoder in place of a matrix: encoder and decoder trained by gradient on the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import Factors, check_matrix, check_rank, factorize, scaled, weighing
from .metrics import exact

STEPS = 300  # evaluations of the loss at most; a third is often enough


def train_autoencoder(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    start: Factors | None = None,
    steps: int = STEPS,
) -> Factors:
    """Encoder B and decoder A of least output error on the calibration rows, found by gradient descent.

    Minimises E|F^½ (W x − A B x)|² = ‖Tᵀ (W − A B) S‖² with S Sᵀ = G and T Tᵀ = F by L-BFGS over Tᵀ A and B S: on whitened
    activations, where no direction is steeper than another for its variance only. The rows enter the loss and its gradient
    through G only, so that each step sees all of them at once and none need be kept. The optimum of a linear autoencoder is
    the whitened factorisation of `factorize` (Baldi & Hornik 1989), and no other minimum is local: this is a check of it, and
    a start for losses that have no closed form.

    Args:
        weight: W, shape (out, in).
        rank: r, with 1 ≤ r ≤ min(out, in).
        gram: G, shape (in, in) or (in,); None: the identity.
        output_gram: F, shape (out, out) or (out,); None: the identity.
        start: factors to begin with; None: the truncated SVD.
        steps: evaluations of the loss at most.

    Returns:
        `Factors(A, B)`, with the dtype and device of `weight`; never worse than `start`.

    Raises:
        ValueError, TypeError: as for `factorize`.
    """
    check_matrix(weight)
    check_rank(rank, weight.shape)
    G, F = weighing(weight, gram, output_gram)
    W, largest = scaled(weight)
    first = start or factorize(weight, rank)
    A, B = F.whiten(exact(first.A)), G.whiten(exact(first.B).mT).mT
    M = G.whiten(F.whiten(W).mT).mT
    whole = float(M.square().sum()) or 1.0
    # Both factors get the same norm, for a like step size, and that of M.
    balance = ((A.norm() * largest / B.norm().clamp(min=1e-300)) ** 0.5).clamp(min=1e-150)
    A, B = ((X.contiguous() * size).requires_grad_() for X, size in ((A, 1 / balance), (B, balance / largest)))

    def loss() -> Tensor:
        return (M - A @ B).square().sum() / whole

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(
        [A, B], max_iter=steps, max_eval=steps, history_size=20, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    with torch.enable_grad():
        before = float(loss().detach())
        optimizer.step(closure)
        after = float(loss().detach())
    if not after < before:
        return first
    A, B = F.unwhiten(A.detach()) * largest**0.5, G.unwhiten(B.detach().mT).mT * largest**0.5
    A, B = (factor.to(weight.dtype).to(weight.device) for factor in (A, B))
    return Factors(A.contiguous(), B.contiguous())
