"""What a matrix can be stored as under a budget of bytes: its form, its rank and the bits of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..config.reparam_config import ReparamConfig
from ..numerics.storage import AS_THE_MODEL, FEW_BITS, FORMS, WIDTHS, Storage
from .allocation import RANK_MULTIPLE, Point

# From one rank that is offered to the next. Between two of them the allocator gives the lower to some matrices and the higher
# to others, which costs next to nothing.
GROWTH = 1.4
LEAST_RANK = 16  # full rank over the lowest rank that is offered
LEAST_PIVOT_RANK = 2  # likewise in pivot form in few bits, which saves little at low ranks, and adds more to the error
MOST_CORRECTED = 8  # full rank over the highest rank of a correction
OF_THE_AVERAGE = 0.25  # what takes a smaller part of a matrix's bytes, against that of all matrices, is not offered
OF_ARRIVED = 0.98  # what takes a larger part of the codes that arrived, which lose nothing, is not offered
CORRECTION_BITS = 8  # of the factors beside a matrix in few bits, where these are allowed


@dataclass(frozen=True)
class ByteOption:
    """One way to store a matrix.

    Attributes:
        rank: of its product; full, where the matrix is stored as it is in few bits; None: dense in the dtype of the model, or
            in the codes in which it arrived.
        storage: what the product takes, in which form and bits.
        cost: bytes.
    """

    rank: int | None
    storage: Storage
    cost: int

    @property
    def form(self) -> str:
        """The form of its product; "dense", where it is none."""
        return "dense" if self.rank is None else self.storage.form_at(self.rank)

    @property
    def bits(self) -> int:
        """Of its numbers; of a corrected matrix, of those of the matrix."""
        return AS_THE_MODEL if self.rank is None else self.storage.bits


def byte_options(
    storage: Storage,
    itemsize: int,
    *,
    forms: Sequence[str],
    bits: Sequence[int],
    multiple: int,
    is_linear: bool = True,
    rank: int | None = None,
    least: float = 0.0,
) -> list[ByteOption]:
    """What a matrix can be stored as, the cheapest first.

    As it is in each of the widths; as a product in each of them, at ranks that save bytes against that; and in the least of
    them with a correction in 8 bits, or else in the dtype of the model, where one of these is allowed, up to what the next
    wider width takes. Ranks grow by a constant factor.

    A matrix that arrived in few bits may keep its codes, whatever widths are allowed, and is offered what takes less only.

    Args:
        storage: the matrix, and whether a bias is moved with its product.
        itemsize: bytes of a number in the dtype of the model.
        forms: of products: some of "factors", "pivot" and "corrected".
        bits: of numbers: some of 16, the dtype of the model, 8 and 4. A matrix that few bits cannot hold has that dtype.
        multiple: what ranks are a multiple of.
        is_linear: whether the layer can hold its matrices in few bits.
        rank: of its products, where it is not to be chosen; then the matrix is not stored as it is.
        least: bytes; of products that take less only the dearest is offered, and only where nothing else is.

    >>> matrix = Storage(64, 64)
    >>> for option in byte_options(matrix, 4, forms=["factors"], bits=[16, 4], multiple=24):
    ...     print(option.form, option.rank, option.bits, option.cost)
    factors 24 4 1728
    dense 64 4 2304
    factors 24 16 12288
    dense None 16 16384
    """
    full = storage.full_rank
    holds_few_bits = is_linear and bool(replace(storage, form="dense", bits=min(FEW_BITS)).widths(full))
    widths = sorted(bits) if holds_few_bits else [AS_THE_MODEL]
    options: list[ByteOption] = []

    def add(rank: int | None, form: str, width: int, correction: int = AS_THE_MODEL, most: float = math.inf) -> None:
        made = replace(storage, form=form, bits=width, correction_bits=correction)
        cost = made.bytes(rank, itemsize)
        if cost < most:
            options.append(ByteOption(rank, made, cost))

    as_it_is = {width: (None if width == AS_THE_MODEL else full) for width in widths}
    if rank is None and storage.arrived is not None and AS_THE_MODEL not in as_it_is:
        add(None, storage.form, AS_THE_MODEL)
    if rank is None:
        for width, whole in as_it_is.items():
            add(whole, "dense" if whole is not None else storage.form, width)
    ranks = _ranks(full, multiple, full // LEAST_RANK) if rank is None else [rank]
    for width, whole in as_it_is.items():
        most = replace(storage, form="dense", bits=width).bytes(whole, itemsize) if rank is None else math.inf
        for form in forms:
            if form != "corrected":
                few = form == "pivot" and width != AS_THE_MODEL and rank is None and "factors" in forms
                for each in ranks:
                    if not few or each * LEAST_PIVOT_RANK >= full:
                        add(each, form, width, most=most)
    correction_widths = {CORRECTION_BITS, AS_THE_MODEL} & {*widths}
    if "corrected" in forms and widths[0] != AS_THE_MODEL and correction_widths and (rank is None or len(forms) == 1):
        wider = [option.cost for option in options if option.form == "dense" and option.bits > widths[0]]
        correction = min(correction_widths)
        for each in _ranks(max(1, full // MOST_CORRECTED), multiple, 1) if rank is None else ranks:
            add(each, "corrected", widths[0], correction, min(wider, default=math.inf))
    options.sort(key=lambda option: (option.cost, option.form != "dense"))
    options = [option for i, option in enumerate(options) if not i or option.cost > options[i - 1].cost]
    if rank is None and storage.arrived is not None:
        options = [option for option in options if option.rank is None or option.cost < OF_ARRIVED * storage.arrived]
    return [option for option in options if option.cost >= least or option.form == "dense"] or options[-1:]


def _ranks(full: int, multiple: int, least: int) -> list[int]:
    """Multiples that grow by `GROWTH` at least, below full rank, from the least or the next; from 1 up where none is."""
    step = multiple if multiple < full else 1
    ranks, rank = [], max(1, math.ceil(least / step)) * step
    while rank < full:
        ranks.append(rank)
        rank = max(rank + step, math.ceil(rank * GROWTH / step) * step)
    return ranks


@dataclass(frozen=True)
class Bytes:
    """What matrices take, and can be stored as, in bytes.

    Attributes:
        dense: bytes of each matrix in the dtype of the model, by module.
        arrived: bytes of each matrix as it arrived, by module: the same, but of those that arrived in few bits.
        options: what each can be stored as, the cheapest first, by module.
    """

    dense: Mapping[str, int]
    arrived: Mapping[str, int]
    options: Mapping[str, Sequence[ByteOption]]

    @classmethod
    def of(
        cls,
        config: ReparamConfig,
        forms: Sequence[str] | None,
        storages: Mapping[str, Storage],
        itemsizes: Mapping[str, int],
        is_linear: Mapping[str, bool],
    ) -> Bytes:
        """What a config allows.

        Args:
            config: with widths, ranks that are given, and matrices that stay dense.
            forms: of products; None: all.
            storages: the matrices.
            itemsizes: bytes of a number in the dtype of the model, by module.
            is_linear: whether a layer can hold its matrices in few bits, by module.
        """
        dense = {name: storage.dense * itemsizes[name] for name, storage in storages.items()}
        arrived = {name: storage.bytes(None, itemsizes[name]) for name, storage in storages.items()}
        fixed = {name for name in storages if name in (config.dense_modules or ())}
        free = sum(dense[name] for name in storages if name not in fixed)
        left = config.keep * sum(dense.values()) - sum(arrived[name] for name in fixed)
        part = max(left / free, 0.0) if free else 0.0
        options = {}
        for name, storage in storages.items():
            if name in fixed:
                continue
            small = min(storage.out_features, storage.in_features) < 8 * RANK_MULTIPLE  # gains nothing by alignment
            options[name] = byte_options(
                storage,
                itemsizes[name],
                forms=FORMS if forms is None else forms,
                bits=WIDTHS if config.bits is None else config.bits,
                multiple=config.rank_multiple or (1 if small else RANK_MULTIPLE),
                is_linear=is_linear[name],
                rank=config.module_rank(name),
                least=OF_THE_AVERAGE * part * dense[name],
            )
        return cls(dense, arrived, options)

    def point(self, name: str, losses: Tensor | None) -> Point:
        """The one thing that a matrix can be stored as, where there is no choice.

        Args:
            name: of the module.
            losses: of its option; None where they are not known.
        """
        (option,) = self.options[name]
        return Point(option.rank, option.cost, math.nan if losses is None else float(losses[0]), option.storage)

    def curve(self, name: str, losses: Tensor, keep: float) -> list[Point]:
        """The points of a matrix, cheapest first, losses falling.

        One that no gradient reaches, to which everything costs nothing, stays as it is in the widest numbers that the fraction
        `keep` of its bytes holds, or the narrowest there are.

        Args:
            name: of the module.
            losses: of its options; inf where it was not computed.
            keep: the fraction of all bytes that is stored.
        """
        points = [
            Point(option.rank, option.cost, loss, None if option.rank is None else option.storage)
            for option, loss in zip(self.options[name], losses.tolist(), strict=True)
            if loss < math.inf
        ]
        if not any(point.loss for point in points):
            alone = [point for point in points if is_dense(point)] or points
            within = [point for point in alone if point.cost <= keep * self.dense[name]]
            return [*within[-1:], *alone[:1]][:1]
        curve: list[Point] = []
        for point in points:
            if not curve or point.loss < curve[-1].loss:
                curve.append(point)
        return curve

    def curve_alone(self, name: str, losses: Tensor, keep: float) -> list[Point]:
        """The points of a matrix that is stored as it is, in whichever width, also where products lose less in fewer bytes.

        None where its rank is given. Arguments as for `curve`.
        """
        is_alone = losses.new_tensor([option.form == "dense" for option in self.options[name]]).bool()
        return self.curve(name, losses.where(is_alone, math.inf), keep)


def is_dense(point: Point) -> bool:
    """Whether a matrix is stored as it is, in whichever width."""
    return point.rank is None or (point.storage is not None and point.storage.form_at(point.rank) == "dense")
