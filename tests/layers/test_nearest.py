"""Products without data: rounded to the nearest, and corrected by what the rounding leaves."""

from __future__ import annotations

import pytest
import torch

from reparam_peft.layers.nearest import nearest, nearest_product
from reparam_peft.layers.product import whole_matrix
from reparam_peft.numerics.decompositions import Corrected, factorize

W = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "largest"), [(8, 1 / 254), (4, 0.16)])
def test_each_number_is_the_nearest(bits: int, largest: float) -> None:
    numbers, scales = nearest(W, bits)
    assert ((numbers - W).abs() <= largest * W.abs().max()).all()
    again, same = nearest(numbers, bits)
    assert torch.allclose(again, numbers)
    assert torch.allclose(same, scales)


def test_a_correction_is_the_best_of_its_rank_for_what_rounding_leaves() -> None:
    errors = []
    for rank in (1, 6, 24):
        product = nearest_product(W, rank, "corrected", {"Q": 4})
        assert isinstance(product.factors, Corrected)
        Q, A, B = product.factors
        best = factorize(W - Q, rank)
        assert torch.allclose(A @ B, best.A @ best.B, atol=1e-6)
        errors.append(float((W - whole_matrix(product, (24, 32))).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_a_matrix_that_is_in_few_bits_already_has_nothing_to_correct() -> None:
    product = nearest_product(W, 3, "corrected")
    assert isinstance(product.factors, Corrected)
    assert product.scales == {}
    assert torch.equal(product.factors.Q, W)
    assert not (product.factors.A @ product.factors.B).any()
    assert product.factors.A.any() or product.factors.B.any(), "one of both is not zero, so that the other can be trained"
