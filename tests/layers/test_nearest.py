"""Products of matrices without data."""

from __future__ import annotations

import pytest
import torch

from reparam_peft.layers.nearest import nearest, nearest_product
from reparam_peft.numerics.decompositions import Corrected


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
