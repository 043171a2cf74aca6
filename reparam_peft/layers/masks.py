"""Sets of rows or columns as one bit for each, packed into bytes: what a checkpoint holds of an index."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.storage import mask_size


def packed(indices: Tensor, size: int) -> Tensor:
    """The mask, uint8, shape (⌈size / 8⌉,), in which bit i mod 8 of byte ⌊i / 8⌋ is set for each index i, the least first.

    >>> packed(torch.tensor([0, 9]), 10)
    tensor([1, 2], dtype=torch.uint8)
    """
    bits = torch.zeros(8 * mask_size(size), dtype=torch.uint8, device=indices.device)
    bits[indices] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpacked(mask: Tensor, size: int) -> Tensor:
    """Which of so many rows a mask has set, bool, shape (size,): the inverse of `packed`.

    >>> unpacked(torch.tensor([5], dtype=torch.uint8), 3)
    tensor([ True, False,  True])
    """
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).bool().flatten()[:size]


def spread(values: Tensor, is_kept: Tensor, dim: int = 0) -> Tensor:
    """Values in the places that are kept, in order, and zeros in the others; gradients flow through.

    >>> spread(torch.tensor([3.0, 4.0]), torch.tensor([True, False, True]))
    tensor([3., 0., 4.])
    """
    places = (is_kept.cumsum(0) - 1).clamp(min=0)  # and not by indices, whose number a graph of a compiler cannot know
    shape = [1] * values.ndim
    shape[dim] = -1
    return torch.where(is_kept.view(shape), values.index_select(dim, places), values.new_zeros(()))
