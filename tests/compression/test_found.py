"""What planning found out about a matrix serves its factorisation, as far as there is room, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from reparam_peft import ReparamConfig
from reparam_peft.compression.factorizing import Factorizer
from reparam_peft.compression.found import Found
from reparam_peft.compression.weighing import Weighing
from reparam_peft.numerics.storage import Storage

W = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
ONE = 8 * 8 * 4  # bytes of the directions of W


def weighing(alike: bool) -> Weighing:
    gram = torch.eye(8, dtype=torch.float64) * torch.arange(1, 9)
    fisher = torch.eye(12, dtype=torch.float64) * torch.arange(1, 13)
    return Weighing(gram if alike else None, fisher, gram, fisher, loss_scale=2.0, mean=torch.zeros(8))


def factorizer(**options: object) -> Factorizer:
    return Factorizer.of(ReparamConfig(**{"method": "whitened", "allocation": "loss", "form": "factors", **options}))


def test_directions_are_kept_as_far_as_there_is_room() -> None:
    found, metrics = Found(factorizer()), weighing(alike=True)
    assert found.losses("a", W, metrics) is not None
    assert found.take("a") is None, "nothing is to be factorised"
    found.room = 2 * ONE
    losses = [found.losses(name, W, metrics) for name in "abc"]
    assert torch.equal(losses[0], losses[1])
    for each in losses:
        assert torch.allclose(each, factorizer().losses(W, metrics), rtol=1e-12)
    assert found.room == 0
    kept = [found.take(name) for name in "abc"]
    assert [each is None for each in kept] == [False, False, True]
    assert found.take("a") is None
    assert found.room == 2 * ONE


@pytest.mark.parametrize(
    ("options", "alike"), [({}, False), ({"method": "autoencoder"}, True), ({"init_weights": False}, True)]
)
def test_other_factorisations_need_others(options: dict[str, object], alike: bool) -> None:
    found = Found(factorizer(**options))
    found.room = ONE
    assert found.losses("a", W, weighing(alike)) is not None
    assert found.take("a") is None


@pytest.mark.parametrize("storage", [Storage(48, 32), Storage(48, 32, bits=4), Storage(48, 32, "pivot", bits=8)])
def test_products_have_the_same_bits_without_them(storage: Storage) -> None:
    X, Y = (torch.randn(200, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) for size in (32, 48))
    gram, fisher = X.mT @ X, Y.mT @ Y
    metrics = Weighing(gram, fisher, gram, fisher, loss_scale=1.0, mean=torch.zeros(32))
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    directions = factorizer().directions(matrix, metrics)
    assert directions is not None
    with_them, without = (factorizer().product(matrix, 20, matrix.dtype, metrics, None, storage, d) for d in (directions, None))
    assert all(map(torch.equal, with_them.factors, without.factors))
