"""From r features to all outputs in the pivot form."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..numerics.storage import mask_size
from .calling import call
from .masks import packed, unpacked


class PivotExpansion(nn.Module):
    """z (..., r) → y (..., out) of the pivot form: y is z itself in the pivot rows and K z in the others.

    Args:
        K: maps r features to out − r; None at rank r = out.
        rank: r.
        out_features: out.
        dim: the dimension of the features, counted from the end.

    Attributes:
        mask: one bit for each output, set for pivots, packed into bytes; shape (⌈out / 8⌉,), uint8. What a checkpoint holds.
        order: the position of each output among the pivots and then the others, shape (out,); follows from `mask`.
    """

    mask: Tensor
    order: Tensor

    def __init__(self, K: nn.Module | None, rank: int, out_features: int, dim: int, device: Device) -> None:
        super().__init__()
        self.K, self.rank, self.dim = K, rank, dim
        self.register_buffer("mask", torch.zeros(mask_size(out_features), dtype=torch.uint8, device=device))
        self.register_buffer("order", torch.arange(out_features, device=device), persistent=False)
        self.is_ordered = False

    def forward(self, z: Tensor) -> Tensor:
        if not self.is_ordered:  # the mask was offloaded, and is here for this pass
            self.refresh()
        K = self._modules.get("K")  # by attribute, these look-ups would take as long as a small product
        if K is None:
            return z
        # One copy in place of two scatters: [z, K z] has the pivots first, and `order` says where each output stands in it.
        return in_order(torch.cat([z, call(K, z)], self.dim), cast(Tensor, self._buffers["order"]), self.dim)

    @property
    def is_pivot(self) -> Tensor:
        """Which outputs are pivots, bool, shape (out,)."""
        return unpacked(self.mask, len(self.order))

    @property
    def pivots(self) -> Tensor:
        """Indices of the pivots, ascending.

        Raises:
            ValueError: the mask does not have r bits set.
        """
        pivots = self.is_pivot.nonzero()[:, 0]
        if len(pivots) != self.rank:
            raise ValueError(f"the mask of the pivot form has {len(pivots)} bits set, and the rank is {self.rank}.")
        return pivots

    def set_pivots(self, pivots: Tensor) -> None:
        """Make the rows with these indices the pivots; where the mask is on meta, it moves to the device of the indices."""
        there = pivots.device if self.mask.device.type == "meta" else self.mask.device
        self.mask = packed(pivots.to(there), len(self.order))
        self.refresh()

    def refresh(self) -> None:
        """Derive `order` from `mask`; where a loader has yet to bring the mask, any order within range."""
        # Only the mask is in a checkpoint: an eighth of a byte for each row, where the order would take eight. On meta there is
        # nothing to derive it from yet. A mask that no loader has filled in has the wrong number of bits, so that positions
        # would run past the end: they are clamped, and `pivots` raises where the mask is used.
        if self.mask.device.type != "meta":
            is_pivot = self.is_pivot
            order = torch.where(is_pivot, is_pivot.cumsum(0), self.rank + (~is_pivot).cumsum(0)) - 1
            self.order = order.clamp(0, len(order) - 1)
            self.is_ordered = True

    def train(self, mode: bool = True) -> PivotExpansion:
        self.refresh()  # every loader ends with `eval()`
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


def in_order(values: Tensor, order: Tensor, dim: int) -> Tensor:
    """Values with what stands along a dimension in another order: `values.index_select(dim, order)`.

    On a CPU that takes ten times as long as a copy, but for float32 along the rows of a matrix; for other floats along the last
    dimension, `gather` is faster.

    Args:
        values: of any shape.
        order: positions in that dimension, int64.
        dim: the dimension, counted from the end.

    >>> in_order(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0, 1]), -1)
    tensor([[3., 1., 2.]])
    """
    if dim != -1 or not values.is_cpu or torch.compiler.is_compiling():
        return values.index_select(dim, order)
    if values.dtype != torch.float32:
        return values.gather(-1, order.expand_as(values))
    return values.reshape(-1, values.shape[-1]).index_select(1, order).view_as(values)
