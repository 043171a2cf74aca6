from __future__ import annotations

import pytest
import torch
from support.tolerances import relative_error
from torch import Tensor

from reparam_peft.numerics.decompositions import direction_losses
from reparam_peft.numerics.neurons import Elimination, eliminate, refitted


def problem(neurons: int = 24, out: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, neurons), C and F: activations that depend on each other, and gradients that do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activations = normal(200, neurons) @ (torch.eye(neurons, dtype=torch.float64) + 0.5 * normal(neurons, neurons))
    gradients = normal(50, out) @ normal(out, out)
    return normal(out, neurons), activations.mT @ activations / 200, gradients.mT @ gradients / 50


def loss_of(W: Tensor, C: Tensor, F: Tensor, kept: Tensor) -> float:
    """½ tr(F E C Eᵀ) with E = W − W' of the refitted columns."""
    error = W.clone()
    error[:, kept] -= refitted(W, C, kept)
    return float((F @ error @ C * error).sum()) / 2


@pytest.mark.parametrize("block", [1, 4])
def test_costs_are_those_of_the_refitted_matrix(block: int) -> None:
    W, C, F = problem()
    found = eliminate(W, C, F, least=8, block=block)
    for count in (24, 20, 16, 8):
        kept = found.kept(count)
        assert len(kept) == count
        assert (kept.diff() > 0).all()
        assert found.loss(count) == pytest.approx(loss_of(W, C, F, kept), rel=1e-4, abs=1e-9)
    assert (found.losses.diff() >= 0).all()


def test_each_step_leaves_out_the_neuron_that_costs_least() -> None:
    W, C, F = problem(neurons=10)
    found = eliminate(W, C, F, least=1, block=1)
    for count in range(10, 1, -1):
        stays = found.kept(count)
        costs = {int(j): loss_of(W, C, F, stays[stays != j]) for j in stays}
        assert found.order[10 - count] == min(costs, key=costs.__getitem__)


def test_refitted_columns_are_the_best_estimate() -> None:
    W, C, F = problem()
    kept = torch.tensor([0, 3, 4, 11, 20])
    best = refitted(W, C, kept)
    for change in torch.randn(5, *best.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        worse = W.clone()
        worse[:, kept] -= best + 1e-2 * change
        assert float((F @ worse @ C * worse).sum()) / 2 > loss_of(W, C, F, kept)


def test_costs_do_not_depend_on_scales() -> None:
    W, C, F = problem()
    plain, scaled = eliminate(W, C, F, least=8), eliminate(W, 1e-12 * C, 1e9 * F, least=8)
    assert torch.equal(plain.order, scaled.order)
    torch.testing.assert_close(scaled.losses, 1e-3 * plain.losses)


def test_neurons_that_are_dead_or_doubled_go_first_and_cost_nothing() -> None:
    W, C, F = problem(neurons=12)
    C[:, 5] = C[5] = 0  # never active
    C[:, 7], C[7] = C[:, 2].clone(), C[2].clone()  # always as neuron 2
    C[7, 7] = C[7, 2] = C[2, 2]
    found = eliminate(W, C, F, least=4, block=1)
    first = set(found.order[:2].tolist())
    assert 5 in first
    assert first & {2, 7}
    assert found.loss(10) < 1e-4 * found.loss(9)


def test_where_nothing_is_active_nothing_is_lost() -> None:
    W, C, F = problem(neurons=6)
    found = eliminate(W, torch.zeros_like(C), F, least=1)
    assert found.losses.tolist() == [0.0] * 6
    assert sorted(found.order.tolist() + found.kept(1).tolist()) == list(range(6))


def test_what_is_given_stays_as_it_is() -> None:
    given = problem(neurons=60)
    before = [matrix.clone() for matrix in given]
    eliminate(*given, least=6, spectra_at=[30])
    refitted(given[0], given[1], torch.arange(20))
    assert all(map(torch.equal, given, before))


def test_all_neurons_may_stay() -> None:
    W, C, F = problem(neurons=5)
    found = eliminate(W, C, F, least=5)
    assert isinstance(found, Elimination)
    assert found.kept(5).tolist() == [0, 1, 2, 3, 4]
    assert found.loss(5) == 0


@pytest.mark.parametrize("block", [1, None])
@pytest.mark.parametrize("shrunk", [0.0, 1e-3])
def test_of_neurons_that_are_all_doubled_half_go_for_nothing(block: int | None, shrunk: float) -> None:
    W, C, F = problem(neurons=48)
    doubled = C.repeat(2, 2) + shrunk * C.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    found = eliminate(torch.cat([W, W.roll(1, 1)], 1), doubled, F, least=30, block=block)
    assert found.loss(48) < 0.1 * found.loss(30)


@pytest.mark.parametrize("least", [0, 25])
def test_how_many_stay_at_least_is_checked(least: int) -> None:
    with pytest.raises(ValueError, match=r"`least` must be in \[1, 24\]"):
        eliminate(*problem(), least=least)
    with pytest.raises(ValueError, match=r"`count` must be in \[20, 24\]"):
        eliminate(*problem(), least=20).kept(19)


@pytest.mark.parametrize("block", [None, 5])
def test_spectra_are_those_of_the_refitted_matrices(block: int | None) -> None:
    W, C, F = problem()
    wanted = [24, 21, 20, 15, 8]
    found = eliminate(W, C, F, least=8, block=block, spectra_at=wanted)
    assert len(found.spectra) == len(wanted)
    for count, spectrum in zip(wanted, found.spectra, strict=True):
        kept = found.kept(count)
        metric = C[kept][:, kept]
        expected = direction_losses(refitted(W, C, kept), metric, F, metric, F)
        assert relative_error(spectrum[: len(expected)], expected) < 1e-5
    with pytest.raises(ValueError, match=r"`spectra_at` must be in \[8, 24\], got \[7\]"):
        eliminate(W, C, F, least=8, spectra_at=[7])
