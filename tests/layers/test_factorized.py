"""The module of a product: its mask, order and state, whatever the kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import PROPERTY
from support.tolerances import assert_close
from torch import Tensor, nn

import reparam_peft.layers.factorized as products_module
from reparam_peft.layers.factorized import FactorizedModule, FactorLinear, PivotExpansion, mask_size
from reparam_peft.layers.kinds import FactorizedLinear
from reparam_peft.numerics.decompositions import Factors, random_factors
from reparam_peft.numerics.pivoting import PivotFactors, other_rows, pivot


@st.composite
def pivot_sets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Indices of pivots, ascending, and how many rows there are."""
    out_features = draw(st.integers(1, 40))
    chosen = draw(st.sets(st.integers(0, out_features - 1), min_size=1))
    return torch.tensor(sorted(chosen)), out_features


def expansion(pivots: Tensor, out_features: int, dim: int = -1) -> PivotExpansion:
    """An expansion in float64 with random coefficients."""
    rank = len(pivots)
    K = None if rank == out_features else nn.Linear(rank, out_features - rank, bias=False).double()
    module = PivotExpansion(K, rank, out_features, dim, None)
    module.set_pivots(pivots)
    return module


def dense(module: PivotExpansion, pivots: Tensor, out_features: int) -> Tensor:
    """A (out, r): the identity in the pivot rows, K in the others."""
    A = torch.zeros(out_features, len(pivots), dtype=torch.float64)
    A[pivots] = torch.eye(len(pivots), dtype=torch.float64)
    if module.K is not None:
        A[other_rows(pivots, out_features)] = module.K.weight.detach()
    return A


def linear(in_features: int, out_features: int, rank: int, form: str, bias: bool = False) -> FactorizedModule:
    B = nn.Linear(in_features, rank, bias=False)
    return FactorizedModule(B, lambda width: nn.Linear(rank, width, bias=False), rank, out_features, form, bias).double()


@PROPERTY
@given(pivot_sets())
def test_the_mask_holds_one_bit_per_row(case: tuple[Tensor, int]) -> None:
    pivots, out_features = case
    module = expansion(pivots, out_features)
    assert module.mask.dtype == torch.uint8
    assert len(module.mask) == mask_size(out_features) == -(-out_features // 8)
    number = sum(int(byte) << (8 * index) for index, byte in enumerate(module.mask.tolist()))
    assert number == sum(1 << int(index) for index in pivots)
    assert torch.equal(module.pivots, pivots)
    assert module.is_pivot.shape == (out_features,)


@PROPERTY
@given(pivot_sets(), st.sampled_from([-1, -3]))
@torch.no_grad()
def test_expands_as_the_dense_matrix_does(case: tuple[Tensor, int], dim: int) -> None:
    pivots, out_features = case
    rank = len(pivots)
    module = expansion(pivots, out_features)
    assert sorted(module.order.tolist()) == list(range(out_features)), "a permutation"
    z = torch.randn(2, 3, rank, dtype=torch.float64)
    expected = z @ dense(module, pivots, out_features).mT
    if dim == -3:  # as of a convolution
        A = module
        module = PivotExpansion(
            A.K and nn.Conv2d(rank, out_features - rank, 1, bias=False).double(), rank, out_features, -3, None
        )
        module.set_pivots(pivots)
        if A.K is not None:
            module.K.weight.copy_(A.K.weight[:, :, None, None])
        z, expected = z.movedim(-1, -3)[None], expected.movedim(-1, -3)[None]
    y = module(z)
    assert y.shape == expected.shape
    assert_close(y, expected)
    assert torch.equal(y.index_select(dim, pivots), z), "the pivots are passed through"


@PROPERTY
@given(pivot_sets(), st.booleans())
@torch.no_grad()
def test_a_state_dict_brings_pivots_and_order(case: tuple[Tensor, int], assign: bool) -> None:
    pivots, out_features = case
    source, target = expansion(pivots, out_features), expansion(torch.arange(len(pivots)), out_features)
    state = source.state_dict()
    assert state.keys() == {"mask"} | ({"K.weight"} if source.K is not None else set()), "the order follows from the mask"
    target.load_state_dict(state, assign=assign)
    z = torch.randn(3, len(pivots), dtype=torch.float64)
    assert torch.equal(target(z), source(z))
    assert torch.equal(target.pivots, pivots)


@PROPERTY
@given(pivot_sets())
@torch.no_grad()
def test_loading_onto_meta_and_filling_the_mask_later_gives_the_same(case: tuple[Tensor, int]) -> None:
    pivots, out_features = case
    source = expansion(pivots, out_features)
    z = torch.randn(3, len(pivots), dtype=torch.float64)
    with torch.device("meta"):
        K = None if source.K is None else nn.Linear(len(pivots), out_features - len(pivots), bias=False)
        target = PivotExpansion(K, len(pivots), out_features, -1, torch.device("meta"))
    target.eval()  # nothing to derive yet
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.order.device.type == "cpu"
    assert torch.equal(target(z), source(z))
    # transformers writes into the buffers of a module that it has made, and then calls `eval`.
    late = expansion(torch.arange(len(pivots)), out_features)
    late.mask.copy_(source.mask)
    late.K = source.K
    assert torch.equal(late.eval()(z), source(z))


def test_set_pivots_replaces_those_before() -> None:
    module = expansion(torch.tensor([0, 9]), 12)
    module.set_pivots(torch.tensor([3, 8]))
    assert module.pivots.tolist() == [3, 8]
    assert module.mask.tolist() == [8, 1]


def test_casts_and_copies_keep_the_mask() -> None:
    module = expansion(torch.tensor([1, 8]), 10)
    for other in (copy.deepcopy(module), copy.deepcopy(module).to(torch.bfloat16), copy.deepcopy(module).half()):
        assert other.mask.dtype == torch.uint8
        assert torch.equal(other.mask, module.mask)
        assert torch.equal(other.order, module.order)
        other.set_pivots(torch.tensor([0, 1]))
    assert module.pivots.tolist() == [1, 8]


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


@PROPERTY
@given(pivot_sets())
def test_gradients_are_those_of_the_dense_expansion(case: tuple[Tensor, int]) -> None:
    pivots, out_features = case
    rank = len(pivots)
    module = expansion(pivots, out_features)
    z = torch.randn(4, rank, dtype=torch.float64, requires_grad=True)
    A = dense(module, pivots, out_features).requires_grad_()
    other = z.detach().clone().requires_grad_()
    probe = torch.randn(4, out_features, dtype=torch.float64)
    (module(z).sin() * probe).sum().backward()
    ((other @ A.mT).sin() * probe).sum().backward()
    assert_close(z.grad, other.grad)
    if module.K is not None:
        assert_close(module.K.weight.grad, A.grad[other_rows(pivots, out_features)])


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


@pytest.mark.parametrize("shape", [(1, 600), (1, 1, 600), (600,), (2, 600), (0, 600)])
def test_single_rows_agree_with_the_plain_product(shape: tuple[int, ...]) -> None:
    layer = FactorLinear(600, 500)
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert_close(layer(x), expected)
        assert layer(x).shape == expected.shape
    assert layer(x).requires_grad, "autograd needs the plain product"


def test_single_rows_take_the_fast_product_only_where_it_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(products_module, "SINGLE_ROW_PRODUCT", lambda x, weight, *rest: calls.append(1) or x @ weight.mT)
    layer, x = FactorLinear(600, 500, bias=False), torch.randn(1, 600)
    layer(x)
    with torch.no_grad():
        layer(torch.randn(2, 600))
        FactorLinear(600, 500).bfloat16()(x.bfloat16())
        FactorLinear(8, 8)(torch.randn(1, 8))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert calls == []
        layer(x)
    assert calls == [1]


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
