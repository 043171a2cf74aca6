"""What a product takes, and the largest rank within a budget, checked against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.strategies import PROPERTY, decimal_keeps, keeps, narrow_storages, sizes, storages

from reparam_peft.layers.schemes import SCHEMES
from reparam_peft.numerics.storage import Storage, matrix_bytes, scale_shape, uniform_rank


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


@PROPERTY
@given(storages(), st.data())
def test_counts_what_a_checkpoint_holds(storage: Storage, data: st.DataObject) -> None:
    out_features, in_features = storage.out_features, storage.in_features
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    if storage.form == "pivot":
        expected = rank * in_features + (out_features - rank) * rank + (out_features + 7) // 8
    else:
        expected = out_features * rank + rank * in_features
    assert storage.parameters(rank) == expected + (out_features if storage.bias else 0)
    assert storage.dense == out_features * in_features
    assert storage.saves(rank) == (storage.parameters(rank) < storage.dense)


@PROPERTY
@given(st.integers(1, 2000), st.integers(1, 2000), st.booleans(), st.data())
def test_the_pivot_form_never_takes_more_than_the_factors_but_for_its_mask(
    out_features: int, in_features: int, bias: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    factors, pivot = (Storage(out_features, in_features, form, bias) for form in ("factors", "pivot"))
    assert pivot.parameters(rank) == factors.parameters(rank) - rank**2 + pivot.mask(rank)
    without = Storage(out_features, in_features, "pivot").parameters(rank) - pivot.mask(rank)
    assert without <= pivot.dense, "as many numbers as a matrix of this rank has degrees of freedom"


@PROPERTY
@given(storages(300_000), st.data())
def test_the_largest_rank_is_the_inverse_of_the_parameters(storage: Storage, data: st.DataObject) -> None:
    limit = min(storage.out_features, storage.in_features)
    rank = data.draw(st.integers(1, limit) | st.integers(1, min(limit, 9)))
    exact = storage.parameters(rank)
    assert storage.largest_rank(exact) == rank
    assert storage.largest_rank(exact - 1) == rank - 1
    assert storage.largest_rank(storage.overhead(1)) == 0
    assert storage.largest_rank(10 * storage.dense + storage.overhead(1)) == limit


@PROPERTY
@given(decimal_keeps(), storages())
def test_in_either_form_it_is_the_largest_rank_within_the_budget(keep: Fraction, storage: Storage) -> None:
    budget = keep * storage.dense
    rank = uniform_rank(float(keep), storage)
    if rank is None:
        assert not storage.saves(1) or storage.largest_rank(float(budget)) >= 1
    elif storage.parameters(rank) <= budget:
        assert storage.parameters(rank + 1) > budget
    else:
        assert rank == 1, "the least there is"
    assert rank is None or storage.saves(rank)


@PROPERTY
@given(narrow_storages(300), st.data())
def test_what_is_left_of_a_matrix_is_stored_with_an_index_and_at_full_rank_as_it_is(
    storage: Storage, data: st.DataObject
) -> None:
    size, (out_features, in_features) = (storage.out_features, storage.in_features), storage.whole
    assert storage.is_narrow
    assert (storage.size, storage.whole_shape, storage.dense) == (size, storage.whole, out_features * in_features)
    rank = data.draw(st.integers(1, min(size)))
    index = (out_features > size[0]) * ((out_features + 7) // 8) + (in_features > size[1]) * ((in_features + 7) // 8)
    bias = size[0] * storage.bias
    if rank == min(size):
        assert storage.form_at(rank) == "dense"
        assert storage.parameters(rank) == size[0] * size[1] + bias + index
        assert storage.largest_rank(storage.parameters(rank)) == rank, "though lower ranks may take more"
    else:
        product = Storage(*size, storage.form, storage.bias)
        assert storage.form_at(rank) == storage.form
        assert storage.parameters(rank) == product.parameters(rank) + index
        assert storage.saves(rank) == (storage.parameters(rank) < storage.parameters(min(size)))
        if storage.saves(rank):
            assert storage.largest_rank(storage.parameters(rank)) == rank
    assert storage.mask(rank) == index + (size[0] + 7) // 8 * (storage.form_at(rank) == "pivot")


def test_no_more_can_be_left_than_there_was() -> None:
    with pytest.raises(ValueError, match=r"`whole` must be at least \(4, 5\), got \(4, 4\)"):
        Storage(4, 5, whole=(4, 4))
    assert not Storage(4, 5, whole=(4, 5)).is_narrow


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(24, 40), (7, 19)])
def test_bytes_of_a_matrix_are_those_of_its_scheme(name: str, shape: tuple[int, int]) -> None:
    tensors = SCHEMES[name].empty(*shape)
    bits = {"int8": 8, "int4": 4}[name]
    assert matrix_bytes(*shape, bits, 2) == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert scale_shape(*shape, bits) in [tuple(tensor.shape) for tensor in tensors.values()]


def test_corrections_have_bits_of_their_own() -> None:
    storage = Storage(64, 32, "corrected", bits=4, correction_bits=8)
    assert storage.widths(16) == {"Q": 4, "A": 8, "B": 8}
    assert storage.widths(8) == {"Q": 4, "B": 8}, "rows of A are too short"
    assert storage.bytes(8, 2) == (1024 + 4 * 32) + 2 * 64 * 8 + (8 * 32 + 4 * 8)
    assert storage.parameters(8) == 64 * 32 + 8 * 96
