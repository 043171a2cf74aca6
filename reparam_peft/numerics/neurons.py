"""Which neurons of an MLP to leave out, what that costs, and the matrix that is refitted to those that stay.

An MLP computes W h of hidden activations h (d,), one for each neuron. Neurons are left out one block after another, so that one
run gives every number of them: the sets are nested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import ABSENT, Metric, exact, solve

AT_A_TIME = 1 / 48  # of the neurons: how many are left out together
COMPACT = 0.9  # part of the rows that are left where the others are taken out of the matrices


@dataclass(frozen=True)
class Elimination:
    """Neurons in the order in which they are left out, and what that costs.

    Attributes:
        order: indices of neurons, shape (steps,), int64: the first k of them are left out first.
        losses: what the first k of them cost together, shape (steps + 1,), float64, ascending from 0. Within a block of neurons
            that are left out together it is shared out by what each of them costs alone.
        neurons: d.
    """

    order: Tensor
    losses: Tensor
    neurons: int

    def kept(self, count: int) -> Tensor:
        """Indices of the neurons that stay where `count` do, ascending, shape (count,), int64.

        >>> Elimination(torch.tensor([2, 0]), torch.zeros(3), 4).kept(3)
        tensor([0, 1, 3])
        """
        stays = torch.ones(self.neurons, dtype=torch.bool, device=self.order.device)
        stays[self.order[: self.neurons - count]] = False
        return stays.nonzero()[:, 0]

    def loss(self, count: int) -> float:
        """What it costs where `count` neurons stay."""
        return float(self.losses[self.neurons - count])


def eliminate(weight: Tensor, gram: Tensor, fisher: Tensor, least: int, block: int | None = None) -> Elimination:
    """Leave out neurons of W h, those first that cost least, with W refitted after each step.

    Of the neurons that stay, S, W' = W C_:S C_SS⁻¹ computes the best estimate of W h, and the loss rises by
    ½ tr(F W (C − C_:S C_SS⁻¹ C_S:) Wᵀ), to second order. Leaving out one neuron j more costs ½ (w'_jᵀ F w'_j) / H_jj, where
    w'_j is its column of W' and H = C_SS⁻¹: the rule of the optimal brain surgeon (Hassibi & Stork 1993) in the metric of both
    sides. Blocks of neurons are left out together, at their exact joint cost. MoDeGPT (arXiv:2408.09632) and FLAT-LLM
    (arXiv:2505.23966) choose neurons by the inputs alone.

    Args:
        weight: W of the layer that reads the neurons, shape (out, d).
        gram: C = E[h hᵀ], or the covariance where a bias is moved; shape (d, d), positive semidefinite.
        fisher: F, of the gradients at the output of W, shape (out, out), positive semidefinite.
        least: the smallest number of neurons that is to stay, in [1, d].
        block: how many neurons are left out at a time; None: `AT_A_TIME` of them.

    Returns:
        The order and the costs, in the units of `direction_losses`.

    >>> torch.manual_seed(0).device
    device(type='cpu')
    >>> eliminate(torch.tensor([[1.0, 5.0, 0.1]]), torch.eye(3), torch.eye(1), 1, block=1).order
    tensor([2, 0])
    """
    metric, T = Metric(gram), Metric(fisher)
    neurons = len(metric.matrix)
    identity = torch.eye(neurons, dtype=torch.float64, device=metric.matrix.device)
    # A neuron that the others determine, or that is always zero, costs nothing and goes first; it needs some variance.
    H = torch.linalg.inv(metric.matrix + ABSENT * identity)
    V = T.whiten(exact(weight))  # Tᵀ W'
    stays = torch.arange(neurons, device=H.device)  # which neurons the rows and columns belong to
    is_left = torch.ones(neurons, dtype=torch.bool, device=H.device)
    order: list[Tensor] = []
    losses = [H.new_zeros(1)]
    left = neurons
    while left > least:
        size = min(max(1, block or round(neurons * AT_A_TIME)), left - least)
        costs = V.square().sum(0) / H.diagonal()
        alone, gone = costs.masked_fill(~is_left, torch.inf).topk(size, largest=False)
        columns, lost = H[:, gone], V[:, gone]
        update = torch.linalg.solve(columns[gone], columns.mT)  # H_gg⁻¹ H_g:
        cost = (lost * torch.linalg.solve(columns[gone], lost.mT).mT).sum().clamp(min=0) / 2
        shares = alone.cumsum(0) / alone.sum().clamp(min=torch.finfo(H.dtype).tiny)
        losses.append(losses[-1][-1] + cost * shares)
        order.append(stays[gone])
        V.addmm_(lost, update, alpha=-1)
        H.addmm_(columns, update, alpha=-1)
        is_left[gone] = False
        left -= size
        if left < COMPACT * len(stays):  # what is gone takes no more time
            rest = is_left.nonzero()[:, 0]
            stays, is_left, V, H = stays[rest], is_left[rest], V[:, rest], H[rest][:, rest]
    indices = torch.cat(order) if order else stays[:0]
    return Elimination(indices, torch.cat(losses) * (metric.scale * T.scale), neurons)


def refitted(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """W' = W C_:S C_SS⁻¹: the columns for the neurons S that stay, which make up for the others; shape (out, |S|), float64.

    Args:
        weight: W, shape (out, d).
        gram: C, as for `eliminate`.
        kept: S, indices, shape (|S|,).
    """
    W, C = exact(weight), exact(gram)
    kept = kept.to(C.device)
    return solve(C[kept][:, kept], (W.to(C.device) @ C[:, kept]).mT).mT
