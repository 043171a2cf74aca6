"""Choose how matrices are stored under a budget: of parameters, or of bytes. `keep` is the fraction of them that is stored."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from ..numerics.storage import Storage

RANK_MULTIPLE = 8  # inner dimensions that matrix products run at full speed on


class Choice(Protocol):
    """Whatever takes some of a budget at some loss."""

    @property
    def cost(self) -> int:
        """What it takes of the budget: numbers or bytes stored."""

    @property
    def loss(self) -> float:
        """Predicted increase of the loss, nats per token."""


class Point(NamedTuple):
    """One way to store a matrix.

    Attributes:
        rank: of its product; None: dense. The full rank of a matrix that is stored as one matrix, because it has lost neurons
            or is in few bits.
        cost: what it takes of the budget: numbers or bytes stored.
        loss: predicted increase of the loss, nats per token.
        storage: what the product takes, in which form and bits; None: as its matrix has it.
    """

    rank: int | None
    cost: int
    loss: float
    storage: Storage | None = None


def points(
    losses: Tensor,
    storage: Storage,
    multiple: int = RANK_MULTIPLE,
    floor: float = 0.0,
    ceiling: float = 1.0,
    cost: Callable[[int | None], int] | None = None,
) -> list[Point]:
    """The curve of a matrix: the ranks to choose from and dense, cheapest first, with what each stores and loses.

    Of a matrix that has lost neurons there may be no point between floor and ceiling.

    Rank r loses Σ_{i>r} q_i. Ranks are multiples of `multiple` that cost less than the matrix does; where none does, from 1 up.

    Args:
        losses: q, shape (min(out, in),), as from `decompositions.direction_losses`.
        storage: the matrix and the form of its product.
        multiple: what ranks are a multiple of.
        floor: the least fraction of the matrix's parameters that is stored, 0 ≤ floor < 1.
        ceiling: the most, floor ≤ ceiling ≤ 1; below 1 the matrix is never dense.
        cost: rank → what it takes of the budget; None → what the whole matrix does. By default the numbers stored.
    """
    cost = storage.stored if cost is None else cost
    tails = [*losses.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    full = len(losses) if storage.is_narrow else None
    least, most, of_whole = floor * storage.dense, ceiling * storage.dense, cost(full)
    for step in (multiple, 1):
        costs = ((rank, cost(rank)) for rank in range(step, len(tails), step) if rank != full)
        cheaper = [(rank, takes) for rank, takes in costs if takes < of_whole]
        within = [(rank, takes) for rank, takes in cheaper if least <= storage.parameters(rank) <= most]
        if within:
            break
    curve = _rising([Point(rank, takes, tails[rank]) for rank, takes in within])
    if full is not None:
        fits = floor * storage.dense <= storage.stored(full) <= ceiling * storage.dense
        return [*curve, Point(full, cost(full), 0.0)] if fits else curve
    return curve if ceiling < 1 and curve else [*curve, Point(None, cost(None), 0.0)]


def _rising(curve: Sequence[Point]) -> list[Point]:
    """Of points of falling loss those than which none of less loss is as cheap."""
    return [point for point, after in pairwise(curve) if point.cost < after.cost] + list(curve[-1:])


def allocate(curves: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """For each curve the point to take, so that the predicted losses sum up to the least within the budget.

    One Lagrange multiplier μ for all curves, found by bisection over the slopes of their lower convex hulls: each takes the
    point with the least loss + μ · cost. What is left of the budget goes, step by step, to the matrix that gains most
    for what it costs; less than one rank step of every matrix remains.

    Args:
        curves: for each matrix its points, cheapest first; losses fall.
        budget: the most that they take in all.

    Returns:
        The index of a point for each curve.

    Raises:
        ValueError: the cheapest points already exceed the budget.

    >>> near, far = [Point(8, 80, 0.1), Point(None, 100, 0.0)], [Point(8, 80, 5.0), Point(None, 100, 0.0)]
    >>> allocate([near, far], 180)
    [0, 1]
    """
    least = sum(curve[0].cost for curve in curves)
    if least > budget:
        raise ValueError(f"the least that can be stored takes {least:,}, and the budget is {budget:,}.")
    hulls = [lower_hull(curve) for curve in curves]
    slopes = sorted({slope for hull in hulls for _, slope in hull[1:]}, reverse=True)
    low, high = 0, len(slopes)  # segments at least as steep as slopes[: low] fit the budget
    while low < high:
        middle = (low + high + 1) // 2
        chosen = [_reach(hull, slopes[middle - 1]) for hull in hulls]
        fits = sum(curve[i].cost for curve, i in zip(curves, chosen, strict=True)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    chosen = [_reach(hull, slopes[low - 1]) if low else 0 for hull in hulls]
    return _spend(curves, chosen, budget - sum(curve[i].cost for curve, i in zip(curves, chosen, strict=True)))


def lower_hull(curve: Sequence[Choice]) -> list[tuple[int, float]]:
    """Indices of the points of the lower convex hull, each with the loss saved for each unit of the budget on the way to it."""
    hull: list[tuple[int, float]] = [(0, math.inf)]
    for index in range(1, len(curve)):
        while True:
            last = hull[-1][0]
            slope = _gain(curve, last, index)
            if slope < hull[-1][1]:
                break
            hull.pop()  # the last point lies above the line from the one before it
        if slope > 0:
            hull.append((index, slope))
    return hull


def _reach(hull: Sequence[tuple[int, float]], slope: float) -> int:
    """The last point of a hull that is reached by segments at least this steep."""
    return [index for index, steepness in hull if steepness >= slope][-1]


def _gain(curve: Sequence[Choice], start: int, end: int) -> float:
    """The loss saved for each unit of the budget between two points."""
    return (curve[start].loss - curve[end].loss) / (curve[end].cost - curve[start].cost)


def _spend(curves: Sequence[Sequence[Choice]], chosen: list[int], left: int) -> list[int]:
    """Move curves to dearer points, the greatest gain for what it costs first, as long as one fits."""
    chosen = list(chosen)

    def best(number: int) -> tuple[float, int, int] | None:
        curve, start = curves[number], chosen[number]
        steps = [
            (-_gain(curve, start, end), number, end)
            for end in range(start + 1, len(curve))
            if curve[end].cost - curve[start].cost <= left
        ]
        return min(steps, default=None)

    queue = [step for step in map(best, range(len(curves))) if step]
    heapq.heapify(queue)
    while queue:
        _, number, end = heapq.heappop(queue)
        price = curves[number][end].cost - curves[number][chosen[number]].cost
        if price <= left:
            left -= price
            chosen[number] = end
        again = best(number)
        if again:
            heapq.heappush(queue, again)
    return chosen
