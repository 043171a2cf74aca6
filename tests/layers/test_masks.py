"""Sets of rows as bits."""

from __future__ import annotations

import torch
from hypothesis import given
from support.strategies import PROPERTY, pivot_sets
from torch import Tensor

from reparam_peft.layers.masks import packed, spread, unpacked


@PROPERTY
@given(pivot_sets())
def test_a_mask_is_unpacked_and_values_are_spread_to_where_it_is_set(case: tuple[Tensor, int]) -> None:
    indices, size = case
    mask = packed(indices, size)
    assert (mask.dtype, mask.shape) == (torch.uint8, (-(-size // 8),))
    is_kept = unpacked(mask, size)
    assert torch.equal(is_kept.nonzero()[:, 0], indices)
    values = torch.randn(3, len(indices), dtype=torch.float64, requires_grad=True)
    for dim, given_ in ((1, values), (0, values.mT)):
        spread_out = spread(given_, is_kept, dim)
        expected = torch.zeros(3, size, dtype=torch.float64)
        expected[:, indices] = values.detach()
        assert torch.equal(spread_out if dim else spread_out.mT, expected)
    spread(values, is_kept, 1).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_what_is_not_finite_stays_in_its_place() -> None:
    is_kept = torch.tensor([False, True, False])
    assert spread(torch.tensor([torch.inf]), is_kept).tolist() == [0.0, torch.inf, 0.0]
