"""The module of a product in each form, whatever the kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.strategies import PRODUCTS, PROPERTY, pivot_sets
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft.layers.factor_linear import FactorLinear
from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.numerics.decompositions import Factors, Whole, random_factors
from reparam_peft.numerics.pivoting import PivotFactors, pivot
from reparam_peft.numerics.storage import Storage


def linear(in_features: int, out_features: int, rank: int, form: str, bias: bool = False) -> FactorizedModule:
    B = nn.Linear(in_features, rank, bias=False)
    return FactorizedModule(B, lambda width: nn.Linear(rank, width, bias=False), rank, out_features, form, bias).double()


@PROPERTY
@given(pivot_sets(), st.data())
def test_a_tampered_mask_is_refused(case: tuple[Tensor, int], data: st.DataObject) -> None:
    pivots, out_features = case
    rank = len(pivots)
    module = linear(5, out_features, rank, "pivot") if rank <= 5 else linear(rank, out_features, rank, "pivot")
    module.A.set_pivots(pivots)
    module.refresh()
    row = data.draw(st.integers(0, out_features - 1))
    module.A.mask[row // 8] ^= 1 << (row % 8)
    bits = rank + (1 if row not in pivots else -1)
    with pytest.raises(ValueError, match=rf"mask of the pivot form has {bits} bits set, and the rank is {rank}"):
        module.refresh()
    with pytest.raises(ValueError, match=f"{bits} bits set"):
        _ = module.factors
    x = torch.randn(2, module.B.in_features, dtype=torch.float64)
    assert module(x).shape == (2, out_features), "no index is out of range"


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@PROPERTY
@given(shapes, st.sampled_from(["factors", "pivot"]), st.booleans(), st.data())
@torch.no_grad()
def test_a_product_that_is_set_is_the_product_that_is_computed(
    shape: tuple[int, int], form: str, bias: bool, data: st.DataObject
) -> None:
    out_features, in_features = shape
    rank = data.draw(st.integers(1, min(shape)))
    factors = random_factors(torch.randn(shape, dtype=torch.float64), rank)
    module = linear(in_features, out_features, rank, form, bias)
    module.set_factors(factors)
    assert module.form == form
    A, B = module.factors
    W = factors.A @ factors.B
    assert_close(A @ B, W)
    x, b, own = (torch.randn(*size, dtype=torch.float64) for size in ((3, in_features), (out_features,), (out_features,)))
    if bias:
        assert not module.bias.any()
        module.set_bias(own)
    # Its own bias takes the place of the layer's.
    assert_close(module(x), x @ W.mT + (own if bias else 0))
    assert_close(module(x, b), x @ W.mT + (own if bias else b))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_pivot_form_is_computed_or_taken_as_it_is(device: str) -> None:
    torch.manual_seed(0)
    factors = Factors(torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    computed = pivot(factors)
    modules = []
    for given_ in (factors, computed):
        with torch.device(device):
            module = linear(5, 9, 3, "pivot", bias=True)
            module.A.mask = module.A.mask.to(device)
        module.set_factors(given_)
        module.set_bias(torch.ones(9))
        modules.append(module)
    for name, tensor in modules[0].state_dict().items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, modules[1].state_dict()[name]), name
    assert torch.equal(modules[0].A.pivots, computed.pivots)
    assert torch.equal(modules[0].B.weight, computed.P)
    assert torch.equal(modules[0].A.K.weight, computed.K)
    assert modules[0].bias.dtype == torch.float64


def test_parameters_that_an_optimiser_holds_stay_the_same_objects() -> None:
    module = linear(5, 9, 3, "pivot", bias=True)
    held = list(module.parameters())
    module.set_factors(Factors(torch.randn(9, 3), torch.randn(3, 5)))
    module.set_bias(torch.ones(9))
    assert all(one is other for one, other in zip(module.parameters(), held, strict=True))


def test_all_rows_as_pivots_take_no_coefficients() -> None:
    module = linear(6, 4, 4, "pivot")
    W = torch.randn(4, 6, dtype=torch.float64)
    module.set_factors(PivotFactors(W, W.new_empty(0, 4), torch.arange(4)))
    assert module.A.K is None
    assert [name for name, _ in module.named_parameters()] == ["B.weight"]
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(module(x), module.B(x))
    assert torch.equal(module.factors.A, torch.eye(4, dtype=torch.float64))


def test_a_bias_is_added_in_the_dtype_of_the_output() -> None:
    B = FactorLinear(5, 2, bias=False)
    module = FactorizedModule(B, lambda width: FactorLinear(2, width, bias=False), 2, 4, "pivot", True).bfloat16()
    module.set_bias(torch.ones(4, dtype=torch.float64))
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()(x.float()).dtype == torch.bfloat16


def test_the_pivot_form_is_not_turned_back() -> None:
    product = pivot(random_factors(torch.randn(9, 5), 3))
    with pytest.raises(TypeError, match=r"in pivot form.*`factors\.factors\(\)`"):
        linear(5, 9, 3, "factors").set_factors(product)


def test_a_bias_needs_a_place() -> None:
    with pytest.raises(ValueError, match="`bias=True`"):
        linear(5, 9, 3, "factors").set_bias(torch.ones(9))


def test_pieces_are_the_layers_that_multiply() -> None:
    for form, names in (("factors", ["B", "A"]), ("pivot", ["B", "A.K"])):
        module = FactorizedLinear(6, 5, 2, form)
        assert list(module.pieces) == names
        assert all(module.get_submodule(name) is piece for name, piece in module.pieces.items())
        assert (module.in_features, module.out_features) == (6, 5)
    assert list(FactorizedLinear(6, 5, 5, "pivot").pieces) == ["B"]


@st.composite
def narrow_modules(draw: st.DrawFn) -> tuple[FactorizedLinear, Tensor, Tensor | None, Tensor | None, Tensor]:
    """A module of what is left of a matrix, that matrix with zeros in the place of the rest, what is left, and the bias."""
    (rows, out_features), (columns, in_features) = draw(pivot_sets()), draw(pivot_sets())
    size, whole = (len(rows), len(columns)), (out_features, in_features)
    assume(size != whole)
    storage = Storage(*size, draw(st.sampled_from(PRODUCTS)), whole=whole)
    rank = draw(st.integers(1, min(size)))
    module = FactorizedLinear(size[1], size[0], rank, storage.form_at(rank), True, dtype=torch.float64, whole=whole)
    factors = random_factors(torch.randn(size, dtype=torch.float64), rank)
    module.set_factors(Whole(factors.A @ factors.B) if module.form == "dense" else factors)
    kept = (rows if len(rows) < out_features else None, columns if len(columns) < in_features else None)
    module.set_kept(*kept)
    bias, matrix = torch.randn(size[0], dtype=torch.float64), torch.zeros(whole, dtype=torch.float64)
    module.set_bias(bias)
    matrix[rows[:, None], columns] = factors.A @ factors.B
    return module, matrix, *kept, bias


@PROPERTY
@given(narrow_modules())
@torch.no_grad()
def test_what_is_left_computes_by_itself_and_is_the_whole_matrix_with_zeros(case: Any) -> None:
    module, matrix, rows, columns, bias = case
    for one, other in ((module.rows, rows), (module.columns, columns)):
        assert one is other is None or torch.equal(one, other)
    assert_close(module.matrix(torch.float64), matrix)
    assert module.size == (module.out_features, module.in_features)
    x = torch.randn(3, module.in_features, dtype=torch.float64)
    at = [torch.arange(size) if kept is None else kept for kept, size in zip((rows, columns), matrix.shape, strict=True)]
    left = matrix[at[0]][:, at[1]]
    assert_close(module(x), x @ left.mT + bias)
    A, B = module.factors
    assert_close(A @ B, left)
    assert torch.equal(module.whole_bias()[at[0]], bias)
    assert module.whole_bias().count_nonzero() == len(bias)
    again = copy.deepcopy(module)
    again.keep_first()
    again.refresh()
    again.set_factors(module.stored)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.matrix(torch.float64), module.matrix(torch.float64))
    counted = {"A.mask": module.rank, "kept_rows": module.out_features, "kept_columns": module.in_features}
    assert {name: marked for name, (marked, _) in module.masks.items()} == {name: counted[name] for name in module.masks}
    assert module.state_dict().keys() >= module.masks.keys()


@PROPERTY
@given(narrow_modules(), st.data())
@torch.no_grad()
def test_a_tampered_index_is_refused_and_computing_does_not_need_it(case: Any, data: st.DataObject) -> None:
    module, *_ = case
    name = data.draw(st.sampled_from(sorted(module.masks.keys() - {"A.mask"})))
    left, features = module.masks[name]
    x = torch.randn(2, module.in_features, dtype=torch.float64)
    expected, bit = module(x), data.draw(st.integers(0, features - 1))
    mask = getattr(module, name)
    marked = left + (1 if not mask[bit // 8] >> (bit % 8) & 1 else -1)
    mask[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ValueError, match=rf"the mask `{name}` has {marked} bits set, and {left} of {features} are left"):
        module.refresh()
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0, 1], None, "`rows` must be 3 indices, got 2"),
        (None, None, "`rows` must be 3 indices, got None"),
        ([0, 1, 2], [0, 1], "`columns` must be None indices, got 2"),
        ([0, 2, 1], None, "`rows` must be ascending indices below 5"),
        ([0, 1, 1], None, "`rows` must be ascending indices below 5"),
        ([0, 1, 5], None, "`rows` must be ascending indices below 5"),
        ([-1, 0, 1], None, "`rows` must be ascending indices below 5"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(rows: list[int] | None, columns: list[int] | None, message: str) -> None:
    module = FactorizedLinear(2, 3, 1, whole=(5, 2))
    with pytest.raises(ValueError, match=message):
        module.set_kept(*(None if indices is None else torch.tensor(indices) for indices in (rows, columns)))


def test_a_matrix_that_is_stored_as_it_is_takes_no_factors() -> None:
    module = FactorizedLinear(4, 3, 3, "dense", whole=(5, 4))
    assert (list(module.pieces), list(dict(module.named_parameters()))) == (["B"], ["B.weight"])
    for given_, one in (
        (Factors(torch.ones(3, 3), torch.ones(3, 4)), module),
        (Whole(torch.ones(3, 4)), linear(4, 3, 2, "pivot")),
    ):
        with pytest.raises(TypeError, match=f"`factors` are {type(given_).__name__}, and this module stores the form"):
            one.set_factors(given_)
