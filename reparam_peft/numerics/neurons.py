"""Which neurons of an MLP to leave out, what that costs, and the matrix that is refitted to those that stay.

An MLP computes W h of hidden activations h (d,), one for each neuron. Neurons are left out one block after another, so that one
run gives every number of them: the sets are nested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import ABSENT, Metric, exact, solve

AT_A_TIME = 1 / 48  # of the neurons: how many are left out together
CANDIDATES = 4  # for each of them, so many that are cheap alone, since two may be cheap only as long as the other stays
COMPACT = 0.9  # part of the rows that are left where the others are taken out of the matrices
BLOCK = 256  # rows of a matrix that are moved at a time


@dataclass(frozen=True)
class Elimination:
    """Neurons in the order in which they are left out, and what that costs.

    Attributes:
        order: indices of neurons, shape (steps,), int64: the first k of them are left out first.
        losses: what the first k of them cost together, shape (steps + 1,), float64, ascending from 0.
        neurons: d.
        spectra: of the refitted matrices of some numbers of neurons: what each of their directions costs, shape (out,) each,
            float64, falling.
    """

    order: Tensor
    losses: Tensor
    neurons: int
    spectra: tuple[Tensor, ...] = ()

    def kept(self, count: int) -> Tensor:
        """Indices of the neurons that stay where `count` do, ascending, shape (count,), int64.

        Raises:
            ValueError: fewer neurons would stay than were to, or more than there are.

        >>> Elimination(torch.tensor([2, 0]), torch.zeros(3), 4).kept(3)
        tensor([0, 1, 3])
        """
        stays = torch.ones(self.neurons, dtype=torch.bool, device=self.order.device)
        stays[self.order[: self._gone(count)]] = False
        return stays.nonzero()[:, 0]

    def loss(self, count: int) -> float:
        """What it costs where `count` neurons stay."""
        return float(self.losses[self._gone(count)])

    def _gone(self, count: int) -> int:
        """How many neurons go where `count` stay."""
        gone = self.neurons - count
        if not 0 <= gone <= len(self.order):
            raise ValueError(f"`count` must be in [{self.neurons - len(self.order)}, {self.neurons}], got {count}.")
        return gone


def eliminate(
    weight: Tensor, gram: Tensor, fisher: Tensor, least: int, block: int | None = None, spectra_at: Sequence[int] = ()
) -> Elimination:
    """Leave out neurons of W h, those first that cost least, with W refitted after each step.

    Of the neurons that stay, S, W' = W C_:S C_SS⁻¹ computes the best estimate of W h, and the loss rises by
    ½ tr(F W (C − C_:S C_SS⁻¹ C_S:) Wᵀ), to second order. Leaving out one neuron j more costs ½ (w'_jᵀ F w'_j) / H_jj, where
    w'_j is its column of W' and H = C_SS⁻¹: the rule of the optimal brain surgeon (Hassibi & Stork 1993) in the metric of both
    sides. For speed, the neurons of a block are chosen among those that are cheap alone. MoDeGPT (arXiv:2408.09632) and
    FLAT-LLM (arXiv:2505.23966) choose neurons by the inputs alone.

    Args:
        weight: W of the layer that reads the neurons, shape (out, d).
        gram: C = E[h hᵀ], or the covariance where a bias is moved; shape (d, d), positive semidefinite.
        fisher: F, of the gradients at the output of W, shape (out, out) or (out,), positive semidefinite.
        least: the smallest number of neurons that is to stay, in [1, d].
        block: how many neurons are left out at a time; None: `AT_A_TIME` of them.
        spectra_at: numbers of neurons, falling, each at least `least`, of which spectra are wanted.

    Returns:
        The order, the costs and the spectra, in the units of `direction_losses`.

    Raises:
        ValueError: `least` is out of range, or spectra are wanted of fewer neurons.

    >>> torch.manual_seed(0).device
    device(type='cpu')
    >>> eliminate(torch.tensor([[1.0, 5.0, 0.1]]), torch.eye(3), torch.eye(1), 1, block=1).order
    tensor([2, 0])
    """
    neurons = len(gram)
    if not 1 <= least <= neurons:
        raise ValueError(f"`least` must be in [1, {neurons}], the number of neurons, got {least}.")
    if any(not least <= count <= neurons for count in spectra_at):
        raise ValueError(f"`spectra_at` must be in [{least}, {neurons}], got {list(spectra_at)}.")
    W = exact(weight)
    T = Metric(exact(fisher).to(W.device))  # which may have come from a file
    gram = exact(gram).to(W.device)
    C, scale = _with_variance(gram)
    V = T.whiten(W).mT.contiguous()  # W'ᵀ T
    cross = C @ V  # C Wᵀ T, of which W' C_SS W'ᵀ is made without C, whose memory the inverse takes
    H = _inverse_in_place(C)
    if H is None:
        H = torch.linalg.inv(_with_variance(gram)[0]).contiguous()
    del C
    stays = torch.arange(neurons, device=H.device)  # which neurons the rows and columns belong to
    is_left = torch.ones(neurons, dtype=torch.bool, device=H.device)
    order: list[Tensor] = []
    losses = [H.new_zeros(1)]
    spectra: list[Tensor] = []
    wanted = list(spectra_at)
    left = neurons

    def spectrum(rows: Tensor, V: Tensor) -> Tensor:
        """Half the squared singular values of Tᵀ W' C_SS^½, of the neurons S at these rows."""
        square = cross.index_select(0, stays[rows]).mT @ V
        return torch.linalg.eigvalsh((square + square.mT) / 2).flip(0).clamp(min=0) / 2

    while wanted and wanted[0] == left:
        spectra.append(spectrum(is_left.nonzero()[:, 0], V))
        wanted.pop(0)
    while left > least:
        size = min(max(1, block or round(neurons * AT_A_TIME)), left - least)
        costs = (V.square().sum(1) / H.diagonal()).masked_fill(~is_left, torch.inf)
        candidates = costs.topk(min(CANDIDATES * size, left), largest=False).indices
        of_candidates = V.index_select(0, candidates)
        between = H.index_select(0, candidates).index_select(1, candidates)
        first, cost = _cheapest(of_candidates @ of_candidates.mT, between, size)
        gone = candidates[first]
        rows, lost = H.index_select(0, gone), V.index_select(0, gone)
        pivot = rows.index_select(1, gone)
        while wanted and wanted[0] >= left - size:  # within this step
            some = left - wanted.pop(0)
            rest = is_left.clone()
            rest[gone[:some]] = False
            keeps = rest.nonzero()[:, 0]
            taken = rows[:some].index_select(1, keeps).mT @ _inverse(pivot[:some, :some])
            spectra.append(spectrum(keeps, V.index_select(0, keeps) - taken @ lost[:some]))
        update = _inverse(pivot) @ rows  # H_gg⁻¹ H_g:
        losses.append(losses[-1][-1] + cost.cumsum(0))
        order.append(stays[gone])
        V.addmm_(update.mT, lost, alpha=-1)
        H.addmm_(rows.mT, update, alpha=-1)
        is_left[gone] = False
        left -= size
        if left < COMPACT * len(stays):  # what is gone takes no more time
            rest = is_left.nonzero()[:, 0]
            stays, is_left, V, H = stays[rest], is_left[rest], V.index_select(0, rest), _narrowed(H, rest)
    indices = torch.cat(order) if order else stays[:0]
    scale *= T.scale
    return Elimination(indices, torch.cat(losses) * scale, neurons, tuple(values * scale for values in spectra))


def _with_variance(gram: Tensor) -> tuple[Tensor, float]:
    """A Gram matrix that may be changed, scaled, and what it was divided by.

    A neuron that the others determine, or that is always zero, costs nothing and goes first; it needs some variance.
    """
    metric = Metric(gram)
    matrix = metric.scaled()
    matrix.diagonal().add_(ABSENT)
    return matrix, metric.scale


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a matrix that is positive definite but for rounding."""
    inverse = _inverse_in_place(matrix.clone())
    return torch.linalg.inv(matrix) if inverse is None else inverse


def _inverse_in_place(matrix: Tensor) -> Tensor | None:
    """The inverse of a symmetric matrix, in its memory, which is lost in any case; None where it is not positive definite."""
    L = matrix.mT  # in the order of LAPACK, which then makes no copy
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(L, out=(L, failed))
    return None if failed else torch.cholesky_inverse(L, out=L).mT


def _narrowed(matrix: Tensor, rest: Tensor) -> Tensor:
    """The rows and columns of a symmetric matrix at ascending indices, in its memory, which is lost.

    Row i of the result lies before row rest[i] of the matrix, so that a block of rows is read before it is written over.
    """
    size, numbers = len(rest), matrix.view(-1)
    narrow = numbers[: size * size].view(size, size)
    for start in range(0, size, BLOCK):
        narrow[start : start + BLOCK] = matrix.index_select(0, rest[start : start + BLOCK]).index_select(1, rest)
    return narrow


def _cheapest(K: Tensor, H: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of some neurons those to leave out one after the other, and what each costs: of two that stand for each other only one.

    Leaving out i takes r = H_i: / H_ii times column i off every column of V and H. Of K = Vᵀ V and of H only the diagonals are
    kept up; the rows of those that go are made out of r, and of w, where K loses w rᵀ + r wᵀ.

    Args:
        K: Vᵀ V of these neurons, shape (n, n), with V = Tᵀ W'.
        H: C_SS⁻¹ of them, shape (n, n).
        count: how many go.
    """
    device = H.device
    # On the processor, since a GPU takes longer to start each of these many small steps than the processor to compute it.
    K, H = K.cpu(), H.cpu()
    norms, variances = K.diagonal().clone(), H.diagonal().clone()
    R, W, pivots = H.new_empty(count, len(H)), H.new_empty(count, len(H)), H.new_empty(count)
    chosen, costs = [], []
    is_gone = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    for step in range(count):
        cost, index = (norms / variances).masked_fill(is_gone, torch.inf).min(0)
        r, w = R[:step, index], W[:step, index]
        row = H[index] - (r * pivots[:step]) @ R[:step]
        of_K = K[index] - w @ R[:step] - r @ W[:step]
        pivots[step] = row[index]
        R[step] = row / row[index]
        W[step] = of_K - of_K[index] / 2 * R[step]
        variances -= row * R[step]
        norms -= 2 * W[step] * R[step]
        is_gone[index] = True
        chosen.append(index)
        costs.append(cost.clamp(min=0) / 2)
    return torch.stack(chosen).to(device), torch.stack(costs).to(device)


def refitted(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """W' = W C_:S C_SS⁻¹: the columns for the neurons S that stay, which make up for the others; shape (out, |S|), float64.

    Args:
        weight: W, shape (out, d).
        gram: C, as for `eliminate`.
        kept: S, indices, shape (|S|,).
    """
    W = exact(weight)
    C = exact(gram).to(W.device)
    return regressed(W @ C.index_select(1, kept.to(C.device)), C, kept)


def regressed(cross: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """X C_SS⁻¹, which takes the neurons S that stay to what they tell of other numbers, float64.

    Args:
        cross: X, means of the other numbers times the neurons S, shape (n, |S|), float64.
        gram: C, as for `eliminate`.
        kept: S, indices, shape (|S|,).
    """
    C = exact(gram)
    kept = kept.to(C.device)
    return solve(C.index_select(0, kept).index_select(1, kept), cross.mT).mT
