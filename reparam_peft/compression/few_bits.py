"""One matrix in few bits: what it becomes in each form, at each rank and width, and what that is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..layers.product import Stored
from ..layers.schemes import SCHEME_OF
from ..numerics.decompositions import Corrected, Factors, Whole, leading_factors
from ..numerics.metrics import Metric, exact
from ..numerics.pivoting import pivot
from ..numerics.rounding import Feedback, Rounded, rounded, rounded_factors, rounded_product
from ..numerics.storage import AS_THE_MODEL, Storage
from ..planning.allocation import Point, lower_hull
from ..planning.byte_options import ByteOption
from .weighing import Weighing

# What rounding adds to the loss of a product changes little from rank to rank, and is taken from computed ones of the same form
# and width where it can be off by no more than this part of the loss.
SURE = 0.02
OFF_BETWEEN, OFF_BESIDE = 0.1, 0.3  # parts of itself that it may be off by, between two ranks and beside one
RESOLVED = 1e-3  # of the loss of what a product is taken off, below which the loss of the rest is computed from the rest alone
WORTH_COMPUTING = 0.05  # by how much of itself a loss is expected below what is known already, at the same bytes

Factorize: TypeAlias = Callable[[Tensor, int], Factors]


class InFewBits(NamedTuple):
    """A product with matrices on the grids of their scales.

    Attributes:
        stored: the matrices, float64.
        scales: of those that are in few bits, by name.
    """

    stored: Stored
    scales: Mapping[str, Tensor]


class Start(NamedTuple):
    """What a product is taken off.

    Attributes:
        error: E = W − W' of a matrix W' that is stored as it is, or W itself; float32.
        weighed: F E G in the scaled metrics, float32.
        loss: tr(F E G Eᵀ) in these.
    """

    error: Tensor
    weighed: Tensor
    loss: float


class Matrix:
    """A matrix W (out, in), to be stored in few bits with the least error in the metrics that losses are predicted in.

    Args:
        W: the matrix, any floating dtype.
        weighing: with its metrics.
        factorize: (matrix, rank) → factors.
        nested: whether factors of a rank are the first columns and rows of those of a higher one.
    """

    def __init__(self, W: Tensor, weighing: Weighing, factorize: Factorize, nested: bool = True) -> None:
        self.W, self.weighing = exact(W), weighing
        self.factorize, self.nested = factorize, nested
        self._dense: dict[int, Rounded] = {}
        self._factors: Factors | None = None
        self._corrections: dict[int, Factors] = {}
        self._starts: dict[int, Start] = {}

    @cached_property
    def feedback(self) -> Feedback:
        """What GPTQ needs of the inputs, for all matrices that read them."""
        return Feedback(self.weighing.gram.to(self.W.device))

    def made(self, rank: int, storage: Storage) -> InFewBits:
        """The matrix in a form, at a rank, in the bits of a storage."""
        form, widths = storage.form_at(rank), storage.widths(rank)
        grids = {name: SCHEME_OF[bits].grid for name, bits in widths.items()}
        stored: Stored
        if form == "dense":
            whole = self.dense(storage.bits)
            stored, rounded = Whole(whole.numbers), {"W": whole}
        elif form == "corrected":
            Q = self.dense(storage.bits)
            factors, rounded = rounded_factors(self.correction(rank, storage.bits), self.feedback, grids)
            stored, rounded = Corrected(Q.numbers, *factors), {**rounded, "Q": Q}
        else:
            factors = self.factors(rank)
            plain = pivot(factors, self.weighing.gram, torch.float64) if form == "pivot" else factors
            stored, rounded = rounded_product(plain, self.feedback, grids)
        scales = {}
        for name, bits in widths.items():
            grid = rounded[name].grid
            if grid is not None:
                scales[name] = SCHEME_OF[bits].scales_of(grid)
        return InFewBits(stored, scales)

    def dense(self, bits: int) -> Rounded:
        """The matrix itself in 8 or 4 bits, rounded with feedback."""
        if bits not in self._dense:
            self._dense[bits] = rounded(self.W, SCHEME_OF[bits].grid(self.W), self.feedback)
        return self._dense[bits]

    def factors(self, rank: int) -> Factors:
        """Factors of the matrix."""
        made = self._factors
        if made is None or len(made.B) < rank or (not self.nested and len(made.B) > rank):
            made = self._factors = self.factorize(self.W, rank)
        return Factors(made.A[:, :rank], made.B[:rank])

    def correction(self, rank: int, bits: int) -> Factors:
        """Factors of what rounding the matrix to some bits leaves."""
        made = self._corrections.get(bits)
        if made is None or len(made.B) < rank:
            made = leading_factors(self.W - self.dense(bits).numbers, rank, self.gram, self.fisher)
            self._corrections[bits] = made
        return Factors(made.A[:, :rank], made.B[:rank])

    @cached_property
    def gram(self) -> Metric:
        """G."""
        return Metric(self.weighing.gram.to(self.W.device))

    @cached_property
    def fisher(self) -> Metric:
        """F; the identity without gradients."""
        F = self.weighing.fisher
        return Metric(self.W.new_ones(len(self.W)) if F is None else F.to(self.W.device))

    def loss(self, stored: Stored) -> float:
        """What a product W' is predicted to add to the loss, nats per token: c · tr(F E G Eᵀ), E = W − W'."""
        if isinstance(stored, Whole):
            return self.scale * self._start(stored.W).loss
        if isinstance(stored, Corrected):
            start, A, B = self._start(stored.Q), stored.A.float(), stored.B.float()
        else:
            start = self._start(None)
            A, B = (factor.float() for factor in (stored if isinstance(stored, Factors) else stored.factors()))
        error = start.error - A @ B
        weighed = start.weighed - self.fisher.times_narrow(A) @ self.gram.times_narrow(B.mT).mT
        lost = _inner(error, weighed)
        if lost < RESOLVED * start.loss:
            lost = _inner(error, self._weighed(error))
        return self.scale * max(lost, 0.0)

    def _start(self, whole: Tensor | None) -> Start:
        """What a product beside a matrix that is stored as it is, or beside none, is taken off."""
        known = (bits for bits, rounded in self._dense.items() if rounded.numbers is whole)
        bits = AS_THE_MODEL if whole is None else next(known, None)
        if bits is not None and bits in self._starts:
            return self._starts[bits]
        error = (self.W if whole is None else self.W - whole).float()
        weighed = self._weighed(error)
        start = Start(error, weighed, max(_inner(error, weighed), 0.0))
        if bits is not None:  # of those in few bits the last, which corrections are beside
            self._starts = {known: kept for known, kept in self._starts.items() if known == AS_THE_MODEL} | {bits: start}
        return start

    def _weighed(self, error: Tensor) -> Tensor:
        """F E G in the scaled metrics, float32."""
        return self.gram.times_narrow(self.fisher.times_narrow(error).mT).mT

    @property
    def scale(self) -> float:
        """What an error in the scaled metrics is multiplied by to be in nats per token."""
        return self.fisher.scale * self.gram.scale * self.weighing.loss_scale / 2

    def losses(self, options: Sequence[ByteOption], directions: Tensor) -> Tensor:
        """What options are predicted to add to the loss, shape (options,); inf where it is not known.

        Computed are the matrix as it is in each width, and of products what may lie on the lower convex hull, unless it is
        known well enough: the loss of the directions that a product leaves out is a bound, on top of which comes what rounding
        adds in the same form and width at ranks that are computed.

        Args:
            options: the cheapest first.
            directions: q, what each direction is predicted to cost, as from `direction_losses`.
        """
        known: dict[int, float] = {}

        def compute(index: int) -> None:
            option = options[index]
            known[index] = 0.0 if option.rank is None else self.loss(self.made(option.rank, option.storage).stored)

        for index, option in enumerate(options):
            if option.form == "dense":
                compute(index)
        bounds = self._bounds(options, directions)
        highest = max((option.rank or 0 for option in options if option.form in ("factors", "pivot")), default=0)
        if highest and self.nested:
            self.factors(highest)  # of which all others are parts
        while True:
            expected, off = _expected(options, known, bounds)
            points = [Point(option.rank, option.cost, loss) for option, loss in zip(options, expected, strict=True)]
            gains = {index: _between(options, known, index) - expected[index] for index, _ in lower_hull(points)}
            is_known = [by <= SURE * loss for by, loss in zip(off, expected, strict=True)]
            worth = {i: gain for i, gain in gains.items() if not is_known[i] and gain > WORTH_COMPUTING * expected[i]}
            if not worth:
                break
            compute(max(worth, key=worth.__getitem__))
        losses = [loss if sure else math.inf for loss, sure in zip(expected, is_known, strict=True)]
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def _bounds(self, options: Sequence[ByteOption], directions: Tensor) -> list[float]:
        """What options lose at least, without what rounding their factors adds."""
        tails = [*directions.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        highest = max((option.rank or 0 for option in options if option.form == "corrected"), default=0)
        left: list[float] = []
        for bits in {option.bits for option in options if option.form == "corrected"}:
            A, B = self.correction(highest, bits)
            gained = (self.fisher.norms(A) * self.gram.norms(B.mT)).cumsum(0) * self.weighing.loss_scale / 2
            lost = self.loss(Whole(self.dense(bits).numbers))
            left = [lost, *(lost - gained).clamp(min=0).tolist()]
        return [(left if o.form == "corrected" else tails)[o.rank or 0] if o.form != "dense" else 0.0 for o in options]


def _inner(one: Tensor, other: Tensor) -> float:
    """The sum of products of all numbers."""
    return float((one * other).sum(dtype=torch.float64))


def _expected(
    options: Sequence[ByteOption], known: Mapping[int, float], bounds: Sequence[float]
) -> tuple[list[float], list[float]]:
    """What options lose, and by how much that may be off.

    As computed; or the bound and what rounding added in the same form and bits, between two ranks by their distance, or at the
    nearest; or the bound alone.
    """
    added: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for index, loss in known.items():
        option = options[index]
        added.setdefault((option.form, option.bits), []).append((option.rank or 0, max(loss - bounds[index], 0.0)))
    expected, off = [], []
    for index, option in enumerate(options):
        seen, rank = added.get((option.form, option.bits)), option.rank or 0
        if index in known:
            expected.append(known[index])
            off.append(0.0)
        elif seen is None:
            expected.append(bounds[index])
            off.append(math.inf)
        else:
            below = max((entry for entry in seen if entry[0] <= rank), default=None)
            above = min((entry for entry in seen if entry[0] > rank), default=None)
            if below is not None and above is not None:
                part = (rank - below[0]) / (above[0] - below[0])
                excess, share = (1 - part) * below[1] + part * above[1], OFF_BETWEEN
            else:
                excess, share = (below or above or (0, 0.0))[1], OFF_BESIDE
            expected.append(bounds[index] + excess)
            off.append(share * excess)
    return expected, off


def _between(options: Sequence[ByteOption], known: Mapping[int, float], index: int) -> float:
    """What is known to be lost with the bytes of an option, half-way between others where it lies between them."""
    points = [Point(options[i].rank, options[i].cost, known[i]) for i in sorted(known)]
    if not points:
        return math.inf
    hull, cost = [points[i] for i, _ in lower_hull(points)], options[index].cost
    below = [point for point in hull if point.cost <= cost]
    above = [point for point in hull if point.cost > cost]
    if not below:
        return math.inf
    if not above:
        return below[-1].loss
    part = (cost - below[-1].cost) / (above[0].cost - below[-1].cost)
    return below[-1].loss + part * (above[0].loss - below[-1].loss)
