"""One matrix in few bits: on the grids of its scales, at the loss that is predicted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reparam_peft.compression.few_bits import Matrix
from reparam_peft.compression.weighing import Weighing
from reparam_peft.layers.schemes import SCHEME_OF
from reparam_peft.numerics.decompositions import Factors, Whole, direction_losses, factorize
from reparam_peft.numerics.storage import FORMS, Storage
from reparam_peft.planning.byte_options import byte_options


def matrix(out: int = 48, inputs: int = 64) -> tuple[Tensor, Weighing, Matrix]:
    """A matrix whose spectrum decays, with inputs of which some are large."""
    generator = torch.Generator().manual_seed(0)

    def gram(size: int) -> Tensor:
        X = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, size)
        return X.mT @ X / len(X)

    U, _, Vh = torch.linalg.svd(torch.randn(out, inputs, generator=generator, dtype=torch.float64), full_matrices=False)
    W = U * torch.exp(-torch.arange(min(out, inputs)) / 8) @ Vh
    G, F = gram(inputs), gram(out)
    weighing = Weighing(G, F, G, F, 2.0, torch.zeros(inputs, dtype=torch.float64))

    def factors(matrix: Tensor, rank: int) -> Factors:
        return factorize(matrix, rank, G, F)

    return W, weighing, Matrix(W, weighing, factors)


@pytest.mark.parametrize(
    ("storage", "rank"),
    [
        (Storage(48, 64, "dense", bits=8), 48),
        (Storage(48, 64, "dense", bits=4), 48),
        (Storage(48, 64, "factors", bits=4), 16),
        (Storage(48, 64, "factors", bits=8), 8),  # of which A has too few columns
        (Storage(48, 64, "pivot", bits=4), 24),
        (Storage(48, 64, "corrected", bits=4, correction_bits=8), 16),
        (Storage(48, 64, "corrected", bits=4), 4),
    ],
)
def test_numbers_are_on_the_grids_of_their_scales_at_the_loss_that_is_computed(storage: Storage, rank: int) -> None:
    W, weighing, made = matrix()
    stored, scales = made.made(rank, storage)
    assert scales.keys() == storage.widths(rank).keys()
    for name, bits in storage.widths(rank).items():
        numbers = getattr(stored, name)
        grid = SCHEME_OF[bits].grid_of(scales[name], numbers.shape)
        torch.testing.assert_close(grid.nearest(numbers), numbers, rtol=1e-12, atol=0)
    A, B = stored if isinstance(stored, Factors) else stored.factors()
    E = W - A @ B
    assert weighing.fisher is not None
    expected = float((weighing.fisher @ E * (E @ weighing.gram)).sum())  # ½ · loss_scale is 1
    assert made.loss(stored) == pytest.approx(expected, rel=1e-4)


def test_a_correction_takes_off_what_rounding_adds() -> None:
    _, _, made = matrix()
    plain = made.loss(made.made(48, Storage(48, 64, "dense", bits=4)).stored)
    by_rank = [made.loss(made.made(r, Storage(48, 64, "corrected", bits=4)).stored) for r in (4, 16)]
    assert by_rank[1] < by_rank[0] < plain
    nearest = SCHEME_OF[4].grid(made.W).nearest(made.W)
    assert plain < 0.9 * made.loss(Whole(nearest))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_computes_what_lies_on_the_lower_hull(shape: tuple[int, int]) -> None:
    W, weighing, made = matrix(*shape)
    assert weighing.fisher is not None
    offered = byte_options(Storage(*shape), 2, forms=FORMS, bits=(16, 8, 4), multiple=4)
    directions = direction_losses(W, weighing.gram, weighing.fisher, weighing.gram, weighing.fisher) * weighing.loss_scale
    losses = made.losses(offered, directions)
    assert all(loss < torch.inf for option, loss in zip(offered, losses, strict=True) if option.form == "dense")
    assert losses[-1] == 0
    exact = torch.tensor([0.0 if o.rank is None else made.loss(made.made(o.rank, o.storage).stored) for o in offered])
    computed = losses < torch.inf
    assert 5 < int(computed.sum()) < len(offered)
    # As computed, or as other ranks show: of these few numbers what rounding adds changes more from rank to rank.
    torch.testing.assert_close(losses[computed].float(), exact[computed], rtol=0.05, atol=1e-8)
    # What was left out is hardly below the line between what was computed.
    cost = torch.tensor([option.cost for option in offered], dtype=torch.float64)
    for index in (~computed).nonzero().flatten().tolist():
        below, above = computed[:index].nonzero().flatten(), index + computed[index:].nonzero().flatten()
        if len(below):
            lines = [
                losses[i] + (losses[j] - losses[i]) * (cost[index] - cost[i]) / (cost[j] - cost[i])
                for i in below.tolist()
                for j in above.tolist()
            ]
            assert exact[index] > 0.85 * min(lines)
