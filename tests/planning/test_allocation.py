"""Ranks that fit a budget, checked against every other choice."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.strategies import PRODUCTS, PROPERTY, decimal_keeps, spectrum, storages
from torch import Tensor

from reparam_peft.numerics.storage import Storage
from reparam_peft.planning.allocation import RANK_MULTIPLE, Point, allocate, points

falling = st.sampled_from(["flat", "polynomial", "exponential", "low rank", "zero"])


@st.composite
def losses(draw: st.DrawFn, size: int) -> Tensor:
    """What the directions of a factorisation cost, as `direction_losses` gives it: not always in order."""
    values = spectrum(draw(falling), size) * draw(st.sampled_from([1.0, 1e-6, 1e3]))
    return values[torch.tensor(draw(st.permutations(range(size))))] if draw(st.booleans()) else values


@PROPERTY
@given(storages(60), st.integers(1, 16), st.floats(0, 0.9), st.floats(0.05, 1), st.data())
def test_points_are_the_ranks_that_are_allowed(
    storage: Storage, multiple: int, floor: float, ceiling: float, data: st.DataObject
) -> None:
    assume(floor <= ceiling)
    limit = min(storage.out_features, storage.in_features)
    q = data.draw(losses(limit))
    curve = points(q, storage, multiple, floor, ceiling)

    def allowed(step: int) -> list[int]:
        ranks = [rank for rank in range(1, limit + 1) if rank % step == 0 and storage.saves(rank)]
        return [rank for rank in ranks if floor * storage.dense <= storage.parameters(rank) <= ceiling * storage.dense]

    ranks = allowed(multiple) or allowed(1)
    dense = [None] if ceiling == 1 or not ranks else []
    assert [point.rank for point in curve] == ranks + dense
    for point in curve:
        assert point.cost == (storage.dense if point.rank is None else storage.parameters(point.rank))
        lost = 0.0 if point.rank is None else float(q[point.rank :].sum())
        assert point.loss == pytest.approx(lost, rel=1e-9, abs=1e-12 * float(q.sum()))
    for one, other in itertools.pairwise(curve):
        assert one.cost < other.cost
        assert one.loss >= other.loss


def test_ranks_are_multiples_of_eight_unless_said_otherwise() -> None:
    curve = points(torch.ones(64), Storage(64, 64))
    assert [point.rank for point in curve] == [8, 16, 24, None]
    assert RANK_MULTIPLE == 8
    assert [point.rank for point in points(torch.ones(6), Storage(6, 64))] == [1, 2, 3, 4, 5, None], "too small for eight"


@st.composite
def curves_and_budgets(draw: st.DrawFn, least: int = 1, most: int = 4, size: int = 24) -> tuple[list[list[Point]], int]:
    """Curves of real matrices, and a budget that can be met."""
    curves = []
    for _ in range(draw(st.integers(least, most))):
        storage = draw(storages(size))
        q = draw(losses(min(storage.out_features, storage.in_features)))
        curves.append(points(q, storage, draw(st.sampled_from([1, 4, 8])), 0.0, draw(st.sampled_from([1.0, 0.9]))))
    cheapest, dearest = (sum(curve[end].cost for curve in curves) for end in (0, -1))
    return curves, draw(st.integers(cheapest, dearest + 10))


def cost(curves: list[list[Point]], chosen: list[int] | tuple[int, ...]) -> int:
    return sum(curve[index].cost for curve, index in zip(curves, chosen, strict=True))


def loss(curves: list[list[Point]], chosen: list[int] | tuple[int, ...]) -> float:
    return math.fsum(curve[index].loss for curve, index in zip(curves, chosen, strict=True))


@PROPERTY
@given(curves_and_budgets(most=8, size=60))
def test_stays_within_the_budget_and_uses_it_up(case: tuple[list[list[Point]], int]) -> None:
    curves, budget = case
    chosen = allocate(curves, budget)
    left = budget - cost(curves, chosen)
    assert left >= 0
    for curve, index in zip(curves, chosen, strict=True):
        if index + 1 < len(curve):
            assert curve[index + 1].cost - curve[index].cost > left, "another rank step would fit"


def largest_steps(curves: list[list[Point]], chosen: list[int]) -> float:
    """The most that one curve could still gain: how far a choice of whole steps may be from the optimum."""
    return max(curve[index].loss - curve[-1].loss for curve, index in zip(curves, chosen, strict=True))


@PROPERTY
@given(curves_and_budgets(most=4, size=14))
def test_no_other_choice_that_costs_no_more_is_much_better(case: tuple[list[list[Point]], int]) -> None:
    """A multiplier finds the optimum but for one matrix, whose next step does not fit any more."""
    curves, budget = case
    assume(math.prod(len(curve) for curve in curves) <= 20_000)
    chosen = allocate(curves, budget)
    got = loss(curves, chosen)
    best = min(
        loss(curves, other) for other in itertools.product(*(range(len(c)) for c in curves)) if cost(curves, other) <= budget
    )
    total = loss(curves, [0] * len(curves))
    assert got >= best - 1e-12 * total
    assert got <= best + largest_steps(curves, chosen) + 1e-12 * total


@PROPERTY
@given(curves_and_budgets(least=2, most=4, size=14), st.data())
def test_any_choice_is_beaten_at_a_cost_where_the_multiplier_is_exact(
    case: tuple[list[list[Point]], int], data: st.DataObject
) -> None:
    """What minimises loss + μ · parameters is the best of all choices that cost no more."""
    curves, _ = case
    slopes = [(one.loss - other.loss) / (other.cost - one.cost) for c in curves for one, other in itertools.pairwise(c)]
    assume(slopes)
    multiplier = data.draw(st.sampled_from(sorted(slopes))) * data.draw(st.sampled_from([0.9, 1.1]))
    exact = [min(range(len(c)), key=lambda i: (c[i].loss + multiplier * c[i].cost, c[i].cost)) for c in curves]
    budget = cost(curves, exact)
    got, total = loss(curves, allocate(curves, budget)), loss(curves, [0] * len(curves))
    assert got <= loss(curves, exact) + 1e-12 * total
    other = [data.draw(st.integers(0, len(curve) - 1)) for curve in curves]
    if cost(curves, other) <= budget:
        assert got <= loss(curves, other) + 1e-12 * total


@PROPERTY
@given(st.lists(st.tuples(falling, st.floats(-3, 3)), min_size=8, max_size=12), st.sampled_from(PRODUCTS), decimal_keeps())
def test_no_uniform_choice_out_of_the_same_points_is_better(
    matrices: list[tuple[str, float]], form: str, keep: Fraction
) -> None:
    """Each matrix at the largest point within the same fraction of it; with single steps as small as they are in practice.

    With a handful of tiny matrices it can be, because no whole step is left that fits: `planning` compares the two.
    """
    curves = [points(spectrum(kind, 48) * 10**size, Storage(48, 64, form), multiple=1) for kind, size in matrices]
    uniform = [max((i for i, point in enumerate(c) if point.cost <= keep * 48 * 64), default=0) for c in curves]
    chosen = allocate(curves, cost(curves, uniform))
    assert loss(curves, chosen) <= loss(curves, uniform) + 1e-12 * loss(curves, [0] * len(curves))


def test_unlike_matrices_gain_by_unlike_ranks() -> None:
    storage = Storage(48, 64, "pivot")
    curves = [points(spectrum("polynomial", 48) * 10 ** (index / 4), storage) for index in range(12)]
    uniform = [max(i for i, point in enumerate(c) if point.cost <= 0.6 * storage.dense) for c in curves]
    assert loss(curves, allocate(curves, cost(curves, uniform))) < 0.6 * loss(curves, uniform)


@PROPERTY
@given(curves_and_budgets(), st.integers(0, 1000))
def test_a_budget_for_everything_takes_everything(case: tuple[list[list[Point]], int], more: int) -> None:
    curves, _ = case
    everything = sum(curve[-1].cost for curve in curves)
    assert allocate(curves, everything + more) == [len(curve) - 1 for curve in curves]


@PROPERTY
@given(curves_and_budgets(), st.integers(1, 1000))
def test_a_budget_that_cannot_be_met_is_refused(case: tuple[list[list[Point]], int], less: int) -> None:
    curves, _ = case
    least = sum(curve[0].cost for curve in curves)
    assert allocate(curves, least)
    with pytest.raises(ValueError, match=f"the least that can be stored takes {least:,}, and the budget is {least - less:,}"):
        allocate(curves, least - less)


def test_takes_from_the_matrix_that_loses_little() -> None:
    storage = Storage(64, 64)
    flat, steep = torch.ones(64) / 64, torch.tensor([0.9] + [0.1 / 63] * 63)
    curves = [points(q, storage) for q in (flat, steep)]
    ranks = [curve[index].rank for curve, index in zip(curves, allocate(curves, int(0.7 * 2 * 64 * 64)), strict=True)]
    assert ranks == [None, 8] or ranks[0] > ranks[1]


def test_nothing_to_choose() -> None:
    assert allocate([], 0) == []
    assert allocate([[Point(8, 80, 1.0)], [Point(None, 100, 0.0)]], 180) == [0, 0]
