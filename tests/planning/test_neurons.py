from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reparam_peft.numerics.storage import Storage
from reparam_peft.planning.neurons import NEURON_FACTOR, Losses, NeuronOption, counts
from reparam_peft.planning.ranks import RankChooser

SIZES = {"up": (40, 16), "down": (16, 40), "other": (16, 16)}
WHOLE = {name: Storage(*size, form="pivot") for name, size in SIZES.items()}


def spectrum(name: str, decay: float = 0.8) -> Tensor:
    """What the directions of a matrix cost."""
    return decay ** torch.arange(16, dtype=torch.float64) * (1 + len(name) / 10)


def option(kept: int, loss: float) -> NeuronOption:
    """So many of 40 neurons, of an MLP whose matrices cost as much for each neuron as before."""
    storages = {
        "up": Storage(kept, 16, form="pivot", whole=(40, 16)),
        "down": Storage(16, kept, form="pivot", whole=(16, 40)),
    }
    return NeuronOption(kept, loss, storages, {name: spectrum(name) * kept / 40 for name in storages})


OPTIONS = [option(36, 0.05), option(30, 0.2), option(20, 0.9)]
DIRECTIONS = {name: spectrum(name) for name in SIZES}


def chooser(keep: float, **options: object) -> RankChooser:
    """Of all three matrices, with every rank offered."""
    return RankChooser(WHOLE, keep, rank_multiple=1, **options)  # type: ignore[arg-type]


def cost_and_loss(ranks: dict[str, int | None], taken: NeuronOption | None) -> tuple[int, float]:
    """What a choice stores, and loses."""
    stored, lost = 0, 0.0 if taken is None else NEURON_FACTOR * taken.loss
    for name, rank in ranks.items():
        storage, losses = WHOLE[name], DIRECTIONS[name]
        if taken is not None and name in taken.storages:
            storage, losses = taken.storages[name], taken.losses[name]
        stored += storage.stored(rank)
        lost += 0.0 if rank is None else float(losses[rank:].sum())
    return stored, lost


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.35])
def test_the_choice_is_nearly_the_best_of_all(keep: float) -> None:
    made = chooser(keep)
    chosen = made.ranks(Losses(DIRECTIONS, {"down": OPTIONS}))
    stored, lost = cost_and_loss(chosen.ranks, chosen.neurons.get("down"))
    assert stored <= made.budget
    best = float("inf")
    for taken in (None, *OPTIONS):
        full = {name: (None if taken is None or name not in taken.storages else 16) for name in SIZES}
        for ranks in itertools.product(*([*range(1, 16, 2), full[name]] for name in SIZES)):
            parameters, loss = cost_and_loss(dict(zip(SIZES, ranks, strict=True)), taken)
            best = min(best, loss) if parameters <= made.budget else best
    assert lost <= 1.1 * best + 1e-9
    assert lost <= cost_and_loss(made.ranks(Losses(DIRECTIONS)).ranks, None)[1] + 1e-12


def test_neurons_go_where_they_cost_less_and_stay_where_they_cost_more() -> None:
    cheap = [option(kept, 1e-9) for kept in (36, 30, 20)]
    dear = [option(kept, 1e9) for kept in (36, 30, 20)]
    chosen = chooser(0.5).ranks(Losses(DIRECTIONS, {"down": cheap}))
    assert chosen.neurons["down"].neurons == 20
    assert not chooser(0.5).ranks(Losses(DIRECTIONS, {"down": dear})).neurons


def test_what_is_left_of_a_matrix_is_stored_as_it_is_where_that_is_best() -> None:
    free = NeuronOption(20, 0.0, OPTIONS[2].storages, {"up": torch.ones(16).double(), "down": torch.ones(16).double()})
    chosen = chooser(0.62).ranks(Losses({**DIRECTIONS, "other": torch.full((16,), 9.0).double()}, {"down": [free]}))
    assert chosen.ranks == {"up": 16, "down": 16, "other": None}


@pytest.mark.parametrize("fixed", ["up", "down"])
def test_an_mlp_of_which_a_rank_is_given_keeps_its_neurons(fixed: str) -> None:
    chosen = chooser(0.5, prescribed={fixed: 5}).ranks(Losses(DIRECTIONS, {"down": [option(20, 0.0)]}))
    assert chosen.ranks[fixed] == 5
    assert not chosen.neurons


def test_floor_and_ceiling_are_of_the_whole_matrix() -> None:
    chosen = chooser(0.5, floor=0.3, ceiling=0.6).ranks(Losses(DIRECTIONS, {"down": OPTIONS}))
    taken = chosen.neurons.get("down")
    for name in ("up", "down"):
        storage = WHOLE[name] if taken is None else taken.storages[name]
        assert 0.3 * 640 <= storage.stored(chosen.ranks[name]) <= 0.6 * 640


@pytest.mark.parametrize(("neurons", "some"), [(1536, 768), (1536, 152), (64, 32), (20, 2), (3, 2), (1, None)])
def test_numbers_of_neurons_that_are_offered(neurons: int, some: int | None) -> None:
    offered = counts(neurons)
    assert offered == sorted(set(offered), reverse=True)
    assert all(0 < count < neurons for count in offered)
    assert some in offered if some else not offered
