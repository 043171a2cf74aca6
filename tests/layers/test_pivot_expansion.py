"""The map from pivots to all outputs: its mask, order and state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import PROPERTY, pivot_sets
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft.layers.pivot_expansion import PivotExpansion, in_order
from reparam_peft.numerics.pivoting import other_rows
from reparam_peft.numerics.storage import mask_size


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), [((5,), -1), ((3, 5), -1), ((2, 3, 5), -1), ((0, 5), -1), ((2, 5, 3, 3), -3)])
def test_values_in_order_are_those_of_a_selection(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    order, values = torch.tensor([3, 0, 4, 1, 2]), torch.randn(shape).to(dtype).requires_grad_()
    y, expected = in_order(values, order, dim), values.index_select(dim, order)
    probe = torch.randn(shape).to(dtype)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(result, values, probe)[0] for result in (y, expected)))


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
