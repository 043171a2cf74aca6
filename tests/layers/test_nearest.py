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


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_what_corrects_the_base_models_own_codes_begins_at_zero_in_random_directions(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    Q, A, B = nearest_product(W, 4, "corrected").factors
    assert Q is not None
    assert torch.equal(Q, W)
    assert not A.any()
    assert (B != 0).all(), "all inputs count from the first step"
    assert 0.7 < float(B.float().square().sum(1).sqrt().mean()) < 1.3
    assert {A.dtype, B.dtype} == {torch.bfloat16}


def test_factors_of_what_rounding_leaves_make_up_for_it() -> None:
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    product = nearest_product(W, 24, "corrected", {"Q": 4})
    assert isinstance(product.factors, Corrected)
    Q, A, B = product.factors
    assert product.scales.keys() == {"Q"}
    torch.testing.assert_close(Q.double(), nearest(W, 4)[0], rtol=1e-6, atol=1e-7)
    assert float((W - Q - A @ B).norm()) < 0.3 * float((W - Q).norm())
