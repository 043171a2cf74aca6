"""A linear autoencoder in place of a matrix: encoder and decoder trained by gradient on the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import Factors, check_matrix, check_rank, factorize
from .metrics import Metric, check_metric

STEPS = 300  # evaluations of the loss at most; from the truncated SVD a tenth is often enough


def train_autoencoder(
    weight: Tensor,
    rank: int,
    gram: Tensor,
    output_gram: Tensor | None = None,
    start: Factors | None = None,
    steps: int = STEPS,
) -> Factors:
    """Encoder B and decoder A of least output error on the calibration rows, found by gradient descent.

    Minimises E|F^½ (W x − A B x)|² = ‖F^½ (W − A B) G^½‖² by L-BFGS. The rows enter the loss and its gradient through G only,
    so that each step sees all of them at once and none need be kept. The optimum of a linear autoencoder is the whitened
    factorisation of `factorize` (Baldi & Hornik 1989), and no other minimum is local: this is a check of it, and a start for
    losses that have no closed form.

    Args:
        weight: W, shape (out, in).
        rank: r, with 1 ≤ r ≤ min(out, in).
        gram: G, shape (in, in) or (in,).
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
    out_features, in_features = weight.shape
    check_metric("gram", gram, in_features)
    if output_gram is None:
        output_gram = torch.ones(out_features, device=weight.device)
    check_metric("output_gram", output_gram, out_features)
    (G, inputs), (F, outputs) = (_standardized(Metric(metric.to(weight.device))) for metric in (gram, output_gram))
    scale = float(weight.detach().abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny))
    W = outputs[:, None] * weight.detach().to(G.matrix) / scale * inputs
    A, B = (factor.to(G.matrix) for factor in (start or factorize(weight, rank)))
    A, B = outputs[:, None] * A, B * inputs
    # Both factors get the same norm, for a like step size, and A takes up the scale of W.
    balance = ((A.norm() * scale / B.norm().clamp(min=1e-300)) ** 0.5).clamp(min=1e-150)
    A, B = (A / balance).requires_grad_(), (B * balance / scale).requires_grad_()
    whole = float(G.norms(W.mT).sum() if G.diagonal else (W * G.times(W.mT).mT).sum()) or 1.0

    def loss() -> Tensor:
        error = W - A @ B
        return (F.times(error) * G.times(error.mT).mT).sum() / whole

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
        initial = A.detach().clone(), B.detach().clone()
        optimizer.step(closure)
        after = float(loss().detach())
    trained = (A.detach(), B.detach()) if after <= before else initial
    A, B = trained[0] * scale**0.5 / outputs[:, None], trained[1] * scale**0.5 / inputs
    return Factors(A.to(weight.dtype), B.to(weight.dtype))


def _standardized(metric: Metric) -> tuple[Metric, Tensor]:
    """The metric of features divided by their root mean squares, and these: channels of unlike size slow the descent down."""
    squares = metric.matrix if metric.diagonal else metric.matrix.diagonal()
    scales = torch.where(squares > 0, squares, 1).sqrt()
    return Metric(metric.matrix / (scales.square() if metric.diagonal else torch.outer(scales, scales))), scales
