"""What a product takes in each form, by rank."""

from __future__ import annotations

import math
from dataclasses import dataclass


def mask_size(out_features: int) -> int:
    """Bytes that hold one bit for each row.

    >>> mask_size(9)
    2
    """
    return math.ceil(out_features / 8)


@dataclass(frozen=True)
class Storage:
    """What the product of a matrix W (out, in) takes, by rank.

    Attributes:
        out_features: rows.
        in_features: columns.
        form: "factors", A (out, r) and B (r, in); or "pivot", r rows of the product, coefficients of the others, and one bit
            for each row that says which is which.
        bias: whether a bias is stored along.
    """

    out_features: int
    in_features: int
    form: str = "factors"
    bias: bool = False

    @property
    def dense(self) -> int:
        """out · in."""
        return self.out_features * self.in_features

    @property
    def mask(self) -> int:
        """Bytes of the mask that holds a bit for each row in pivot form; each counts as a number stored."""
        return mask_size(self.out_features) if self.form == "pivot" else 0

    @property
    def overhead(self) -> int:
        """Numbers stored at any rank: bias and mask."""
        return self.bias * self.out_features + self.mask

    def parameters(self, rank: int) -> int:
        """r (out + in), in pivot form r (out + in − r), and the overhead.

        >>> Storage(10, 20).parameters(2), Storage(10, 20, "pivot").parameters(2)
        (60, 58)
        """
        across = self.out_features + self.in_features - (rank if self.form == "pivot" else 0)
        return rank * across + self.overhead

    def stored(self, rank: int | None) -> int:
        """Numbers that a product of this rank takes, or the matrix itself where it stays dense (None)."""
        return self.dense if rank is None else self.parameters(rank)

    def saves(self, rank: int) -> bool:
        """Whether the product at this rank takes fewer numbers than the matrix.

        >>> Storage(10, 10).saves(5), Storage(10, 10).saves(4)
        (False, True)
        """
        return self.parameters(rank) < self.dense

    def largest_rank(self, parameters: float) -> int:
        """The largest rank, at most min(out, in), whose product takes at most so many numbers; 0 where there is none.

        >>> Storage(576, 576).largest_rank(0.8 * 576 * 576), Storage(576, 576, "pivot").largest_rank(0.8 * 576 * 576)
        (230, 318)
        """
        room, across = parameters - self.overhead, self.out_features + self.in_features
        if room <= 0:
            return 0
        # The smaller root of r (out + in − r) = room, and the slack that keeps a whole result from being floored away.
        root = (across - math.sqrt(max(across**2 - 4 * room, 0))) / 2 if self.form == "pivot" else room / across
        return min(math.floor(root * (1 + 1e-12)), self.out_features, self.in_features)


def uniform_rank(keep: float, storage: Storage) -> int | None:
    """The largest rank whose product takes at most `keep` of the matrix's parameters, or None for a matrix that stays dense.

    At least 1. `keep` = 1 keeps the matrix: truncating it would lose accuracy and save nothing that was asked for.

    Args:
        keep: fraction of out · in that is stored, 0 < keep ≤ 1.
        storage: the matrix and the form of its product.

    >>> uniform_rank(0.8, Storage(576, 576))
    230
    >>> uniform_rank(1.0, Storage(576, 1536)) is None
    True
    >>> uniform_rank(0.5, Storage(1, 10)) is None
    True
    """
    if keep >= 1:
        return None
    rank = max(1, storage.largest_rank(keep * storage.dense))
    return rank if storage.saves(rank) else None


FORMS = ("factors", "pivot")
