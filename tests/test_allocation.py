"""Ranks that fit a budget, checked against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import PROPERTY, keeps

from reparam_peft.allocation import Storage, uniform_rank

sizes = st.integers(1, 20_000)


@st.composite
def decimal_keeps(draw: st.DrawFn) -> Fraction:
    """A `keep` below 1 as a person writes it: a fraction with a small denominator, which a float holds only roughly."""
    denominator = draw(st.sampled_from([2, 3, 5, 10, 64, 100]))
    return Fraction(draw(st.integers(1, denominator - 1)), denominator)


@PROPERTY
@given(decimal_keeps(), sizes, sizes)
def test_is_the_largest_rank_within_the_budget(keep: Fraction, out_features: int, in_features: int) -> None:
    budget = keep * out_features * in_features
    largest = budget // (out_features + in_features)
    rank = uniform_rank(float(keep), Storage(out_features, in_features))
    if largest >= 1:
        assert rank == largest
        assert Storage(out_features, in_features).parameters(rank) <= budget
        assert Storage(out_features, in_features).parameters(rank + 1) > budget
    elif rank is not None:
        assert rank == 1


@pytest.mark.parametrize(("keep", "shape", "rank"), [(0.7, (96, 30), 16), (0.36, (10, 50), 3), (0.57, (50, 64), 16)])
def test_a_whole_product_is_not_floored_by_the_rounding_of_keep(keep: float, shape: tuple[int, int], rank: int) -> None:
    assert uniform_rank(keep, Storage(*shape)) == rank


@PROPERTY
@given(keeps, sizes, sizes)
def test_stores_no_more_than_asked_for(keep: float, out_features: int, in_features: int) -> None:
    budget = Fraction(keep) * out_features * in_features
    assume(budget >= out_features + in_features)
    rank = uniform_rank(keep, Storage(out_features, in_features))
    assume(rank is not None)
    assert Storage(out_features, in_features).parameters(rank) <= budget * (1 + Fraction(1, 10**11))


@PROPERTY
@given(keeps, keeps, sizes, sizes)
def test_grows_with_keep(one: float, other: float, out_features: int, in_features: int) -> None:
    low, high = (uniform_rank(keep, Storage(out_features, in_features)) for keep in sorted((one, other)))
    dense = max(out_features, in_features) + 1
    assert (low or dense) <= (high or dense)


@PROPERTY
@given(keeps.filter(lambda keep: keep < 1), sizes | st.integers(1, 4), sizes | st.integers(1, 4))
def test_dense_exactly_where_no_rank_makes_it_smaller(keep: float, out_features: int, in_features: int) -> None:
    rank = uniform_rank(keep, Storage(out_features, in_features))
    rank_one_is_no_smaller = out_features + in_features >= out_features * in_features
    assert (rank is None) == rank_one_is_no_smaller
    if rank is not None:
        assert Storage(out_features, in_features).saves(rank)
        assert 1 <= rank < min(out_features, in_features)


@PROPERTY
@given(sizes, sizes)
def test_keeping_all_keeps_the_matrix(out_features: int, in_features: int) -> None:
    assert uniform_rank(1.0, Storage(out_features, in_features)) is None
    assert uniform_rank(1, Storage(out_features, in_features)) is None


@PROPERTY
@given(st.integers(1, 20_000), sizes, sizes)
def test_saves_parameters_below_the_break_even_rank(rank: int, out_features: int, in_features: int) -> None:
    break_even = Fraction(out_features * in_features, out_features + in_features)
    assert Storage(out_features, in_features).saves(rank) == (rank < break_even)
