"""What a product takes in each form, by rank and by the bits of its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args


def mask_size(out_features: int) -> int:
    """Bytes that hold one bit for each row.

    >>> mask_size(9)
    2
    """
    return math.ceil(out_features / 8)


LEAST_INPUTS = 16  # shorter rows are not stored in few bits: their scales would take a good part of what is saved
NF4_BLOCK = 64  # numbers with a scale of their own, as in QLoRA, arXiv:2305.14314
AS_THE_MODEL = 16  # the bits of numbers that are stored in the dtype of the model, whichever that is
OF_THE_BASE = 0  # of a corrected matrix that arrived in few bits, and that the base model keeps
SCALE_BYTES = 4


def scale_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Of the scales, float32, of a matrix in 8 bits, one for each row, or in 4, one for each `NF4_BLOCK` numbers.

    >>> scale_shape(3, 50, 8), scale_shape(3, 50, 4)
    ((3, 1), (3,))
    """
    return (rows, 1) if bits == 8 else (math.ceil(rows * columns / NF4_BLOCK),)


def matrix_bytes(rows: int, columns: int, bits: int, itemsize: int) -> int:
    """What a matrix takes with its scales: in 8 or 4 bits, or in the dtype of the model, a number of which takes `itemsize`.

    >>> matrix_bytes(64, 64, 16, 2), matrix_bytes(64, 64, 8, 2), matrix_bytes(64, 64, 4, 2)
    (8192, 4352, 2304)
    """
    numbers = rows * columns
    if bits == AS_THE_MODEL:
        return numbers * itemsize
    return math.ceil(numbers * bits / 8) + SCALE_BYTES * math.prod(scale_shape(rows, columns, bits))


def narrow_form(rank: int, size: Sequence[int], form: str) -> str:
    """How a matrix that has lost rows or columns, so that its shape is `size`, is stored at a rank.

    >>> narrow_form(3, (4, 3), "pivot"), narrow_form(2, (4, 3), "pivot")
    ('dense', 'pivot')
    """
    return "dense" if rank == min(size) else form


@dataclass(frozen=True)
class Storage:
    """What the product of a matrix W (out, in) takes, by rank.

    A narrow storage is of a matrix that has lost rows, or columns, for good. At its full rank, min(out, in), there is nothing
    to factorise: it is stored as the one matrix that it is, in the form "dense". An index says which rows or columns are left,
    one bit for each of the whole matrix.

    Attributes:
        out_features: rows; of a narrow one, those that are left.
        in_features: columns; of a narrow one, those that are left.
        form: "factors", A (out, r) and B (r, in); "pivot", r rows of the product, coefficients of the others, and one bit for
            each row that says which is which; "dense", the matrix itself, in few bits; or "corrected", that and factors beside
            it.
        bias: whether a bias is stored along.
        whole: (out, in) of the matrix of which rows or columns were left out; None: all are there.
        bits: of the numbers of the product, of a corrected one of those of the matrix: 8 or 4; 16: the dtype of the model;
            0, of a corrected one: it is the base model's, which arrived quantised, and only the factors are stored.
        correction_bits: of the factors beside a corrected matrix, likewise.
        arrived: bytes of the matrix in the codes in which it arrived, with their scales; None: it arrived in the dtype of the
            model.

    Raises:
        ValueError: more is left than there was.
    """

    out_features: int
    in_features: int
    form: str = "factors"
    bias: bool = False
    whole: tuple[int, int] | None = None
    bits: int = AS_THE_MODEL
    correction_bits: int = AS_THE_MODEL
    arrived: int | None = None

    def __post_init__(self) -> None:
        if self.whole is not None and (self.out_features > self.whole[0] or self.in_features > self.whole[1]):
            raise ValueError(f"`whole` must be at least ({self.out_features}, {self.in_features}), got {self.whole}.")

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(out, in) of the matrix before rows or columns were left out."""
        return (self.out_features, self.in_features) if self.whole is None else self.whole

    @property
    def is_narrow(self) -> bool:
        """Whether rows or columns were left out."""
        return self.whole_shape != (self.out_features, self.in_features)

    @property
    def size(self) -> tuple[int, int] | None:
        """(out, in) of what is left, where rows or columns were left out; else None."""
        return (self.out_features, self.in_features) if self.is_narrow else None

    @property
    def full_rank(self) -> int:
        """min(out, in)."""
        return min(self.out_features, self.in_features)

    @property
    def dense(self) -> int:
        """out · in of the whole matrix."""
        return math.prod(self.whole_shape)

    def form_at(self, rank: int) -> str:
        """How a product of this rank is stored: in its form, or at the full rank of a narrow matrix "dense".

        >>> Storage(6, 4, "pivot", whole=(8, 4)).form_at(4), Storage(8, 4, "pivot").form_at(4)
        ('dense', 'pivot')
        """
        return narrow_form(rank, (self.out_features, self.in_features), self.form) if self.is_narrow else self.form

    @property
    def index(self) -> int:
        """Bytes that say which rows and columns are left, where some are left out."""
        out_features, in_features = self.whole_shape
        rows = mask_size(out_features) if out_features > self.out_features else 0
        return rows + (mask_size(in_features) if in_features > self.in_features else 0)

    def mask(self, rank: int) -> int:
        """Bytes of masks: the index, and in pivot form a bit for each row; each counts as a number stored."""
        return self.index + (mask_size(self.out_features) if self.form_at(rank) == "pivot" else 0)

    def overhead(self, rank: int) -> int:
        """Numbers stored beside the product: bias and masks."""
        return self.bias * self.out_features + self.mask(rank)

    def parameters(self, rank: int) -> int:
        """r (out + in), in pivot form r (out + in − r), in the form "dense" out · in; and the overhead.

        >>> Storage(10, 20).parameters(2), Storage(10, 20, "pivot").parameters(2), Storage(8, 20, whole=(10, 20)).parameters(8)
        (60, 58, 162)
        """
        return sum(rows * columns for rows, columns in self.matrices(rank).values()) + self.overhead(rank)

    def matrices(self, rank: int) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the matrices that the product of this rank consists of, by the names that its class gives them.

        >>> Storage(10, 20, "pivot").matrices(2)
        {'P': (2, 20), 'K': (8, 2)}
        """
        A, B, W = (self.out_features, rank), (rank, self.in_features), (self.out_features, self.in_features)
        form = self.form_at(rank)
        if form == "pivot":
            return {"P": B, "K": (self.out_features - rank, rank)}
        if form == "dense":
            return {"W": W}
        return {"Q": W, "A": A, "B": B} if form == "corrected" and self.bits != OF_THE_BASE else {"A": A, "B": B}

    def widths(self, rank: int) -> dict[str, int]:
        """The bits of those matrices whose numbers are stored in few bits, by the same names.

        >>> Storage(10, 20, "pivot", bits=8).widths(17), Storage(10, 20, "corrected", bits=4).widths(2)
        ({'P': 8, 'K': 8}, {'Q': 4})
        """
        corrects = self.form_at(rank) == "corrected"
        widths = {}
        for name, (rows, columns) in self.matrices(rank).items():
            bits = self.correction_bits if corrects and name != "Q" else self.bits
            if bits != AS_THE_MODEL and rows and columns >= LEAST_INPUTS:
                widths[name] = bits
        return widths

    def bytes(self, rank: int | None, itemsize: int) -> int:
        """What a product of this rank takes in all, or the whole matrix where it stays as it arrived (None).

        Args:
            rank: r.
            itemsize: bytes of a number in the dtype of the model.

        >>> Storage(64, 64).bytes(8, 2), Storage(64, 64, bits=8).bytes(None, 2), Storage(64, 64, "dense", bits=8).bytes(64, 2)
        (2048, 8192, 4352)
        >>> Storage(64, 64, arrived=2304).bytes(None, 2)
        2304
        """
        if rank is None:
            return self.dense * itemsize if self.arrived is None else self.arrived
        widths = self.widths(rank)
        matrices = (
            matrix_bytes(*shape, widths.get(name, AS_THE_MODEL), itemsize) for name, shape in self.matrices(rank).items()
        )
        return sum(matrices) + self.bias * self.out_features * itemsize + self.mask(rank)

    def stored(self, rank: int | None) -> int:
        """Numbers that a product of this rank takes, or the whole matrix where it stays dense (None)."""
        return self.dense if rank is None else self.parameters(rank)

    def saves(self, rank: int) -> bool:
        """Whether the product at this rank takes fewer numbers than the matrix; of a narrow one, than what is left as it is.

        A corrected matrix has more numbers, and saves where it takes fewer bytes than in half precision.

        >>> Storage(10, 10).saves(5), Storage(10, 10).saves(4), Storage(64, 64, "corrected", bits=4).saves(8)
        (False, True, True)
        """
        if self.form_at(rank) == "corrected":
            return self.bytes(rank, 2) < self.bytes(None, 2)
        as_one = self.is_narrow and rank < self.full_rank
        return self.parameters(rank) < (self.parameters(self.full_rank) if as_one else self.dense)

    def largest_rank(self, parameters: float) -> int:
        """The largest rank, at most min(out, in), whose product takes at most so many numbers; 0 where there is none.

        >>> Storage(576, 576).largest_rank(0.8 * 576 * 576), Storage(576, 576, "pivot").largest_rank(0.8 * 576 * 576)
        (230, 318)
        """
        full = self.full_rank
        if self.is_narrow and self.parameters(full) <= parameters:
            return full
        most = full - 1 if self.is_narrow else full
        room, across = parameters - self.overhead(0), self.out_features + self.in_features
        if room <= 0:
            return 0
        # The smaller root of r (out + in − r) = room, and the slack that keeps a whole result from being floored away.
        root = (across - math.sqrt(max(across**2 - 4 * room, 0))) / 2 if self.form == "pivot" else room / across
        return min(math.floor(root * (1 + 1e-12)), most)


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


Form = Literal["factors", "pivot", "corrected"]
FORMS: tuple[str, ...] = get_args(Form)
ALL_FORMS = (*FORMS, "dense")  # of single modules
Width = Literal[16, 8, 4]
WIDTHS: tuple[int, ...] = get_args(Width)  # of numbers, in bits
FEW_BITS = tuple(width for width in WIDTHS if width != AS_THE_MODEL)
