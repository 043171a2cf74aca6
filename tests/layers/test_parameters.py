from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft.layers.parameters import (
    OpenedParameter,
    Reading,
    close_parameter,
    open_parameter,
    opened_parameters,
    readings,
)


class Net(nn.Module):
    """A module that multiplies by a parameter of its own."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.W)


# Shape of the parameter, what is computed, shape of the input, and the pattern of the matrix.
USES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor], tuple[int, ...], str]] = {
    "heads": ((6, 2, 3), lambda x, W: torch.einsum("ibh,hnd->ibnd", x, W), (5, 4, 6), "(a) -> (b c)"),
    "from heads": ((6, 2, 3), lambda x, W: torch.einsum("ibnd,hnd->ibh", x, W), (5, 4, 2, 3), "(a) <- (b c)"),
    "parameter first": ((6, 4), lambda x, W: torch.einsum("hm, bhi -> bim", W, x), (5, 6, 3), "(a) -> (b)"),
    "permuted": ((6, 2, 3), lambda x, W: torch.einsum("bih,hnd->nbdi", x, W), (5, 4, 6), "(a) -> (b c)"),
    "experts": ((3, 6, 4), lambda x, W: torch.bmm(x, W), (3, 5, 6), "a (b) -> (c)"),
    "experts by einsum": ((3, 4, 6), lambda x, W: torch.einsum("eti,eoi->teo", x, W), (3, 5, 6), "a (b) <- (c)"),
    "operator": ((6, 4), lambda x, W: x @ W, (5, 2, 6), "(a) -> (b)"),
    "matmul": ((2, 3, 6, 4), lambda x, W: torch.matmul(x, W), (2, 3, 5, 6), "a b (c) -> (d)"),
    "linear": ((4, 6), lambda x, W: F.linear(x, W, torch.ones(4)), (5, 6), "(a) <- (b)"),
}


@pytest.mark.parametrize("use", USES)
def test_products_are_seen_and_computed_by_layers(use: str) -> None:
    shape, function, inputs, pattern = USES[use]
    net, x = Net(shape, function), torch.randn(inputs)
    with readings({"W": net.W}) as found:
        expected = net(x)
    assert {name: reading.pattern() for name, reading in found.items()} == {"W": pattern}
    before = net.W.detach().clone()
    open_parameter(net, "W", found["W"])
    opened = opened_parameters(net)["W"]
    assert isinstance(net.W, OpenedParameter)
    calls: list[int] = []
    for layer in opened.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    assert_close(copy.deepcopy(net)(x), expected)
    result = net(x)
    assert_close(result, expected)
    assert len(calls) == 2 * len(opened.layers)
    result.sum().backward()
    gradients = torch.stack([layer.weight.grad for layer in opened.layers])
    twin = Net(shape, function)
    twin(x).sum().backward()
    assert_close(found["W"].parameter(gradients, shape), twin.W.grad)
    close_parameter(net, "W")
    assert torch.equal(net.W, before)
    assert_close(net(x), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, W: x + W[0],
        lambda x, W: x * W.sum(),
        lambda x, W: x @ (2 * W),
        lambda x, W: x @ W.transpose(0, 1).contiguous().view(6, 6),
        lambda x, W: x.to(W.dtype) @ W.to(torch.float64).float(),
        lambda x, W: torch.einsum("bi,ij,jk->bk", x, W, W),
        lambda x, W: torch.cat([x, W]),
        lambda x, W: x[: len(W)] + W.float(),
    ],
)
def test_any_other_use_gets_the_numbers(use: Callable[[Tensor, Any], Tensor]) -> None:
    net, x = Net((6, 6), use), torch.randn(6, 6)
    expected = net(x)
    open_parameter(net, "W", Reading(0, 1, 1, False))
    result = net(x)
    assert_close(result, expected)
    result.sum().backward()
    twin = Net((6, 6), use)
    twin(x).sum().backward()
    assert_close(net.W.layers[0].weight.grad, twin.W.grad)


def test_another_product_than_the_pattern_says_is_right_too() -> None:
    net, x = Net((6, 6), lambda x, W: x @ W), torch.randn(2, 6)
    expected = net(x)
    open_parameter(net, "W", Reading.parse("(o) <- (i)"))
    assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("shape", "use"),
    [((3, 6, 4), lambda x, W: torch.matmul(x, W)), ((3, 6, 4), lambda x, W: torch.einsum("eti,eio->eto", x, W))],
)
def test_a_product_that_is_broadcast_gets_the_numbers(shape: tuple[int, ...], use: Callable[[Tensor, Any], Tensor]) -> None:
    net, x = Net(shape, use), torch.randn(1, 5, 6)
    expected = net(x)
    open_parameter(net, "W", Reading.parse("e (i) -> (o)"))
    assert_close(net(x), expected)


@pytest.mark.parametrize("write", [lambda W: W.mul_(2), lambda W: W.data.clamp_(0, 1), lambda W: W.__setitem__(0, 1.0)])
def test_an_opened_parameter_cannot_be_written_to(write: Callable[[Any], Any]) -> None:
    net = Net((6, 6), lambda x, W: x)
    open_parameter(net, "W", Reading(0, 1, 1, False))
    with pytest.raises((RuntimeError, AttributeError), match=r"cannot be written to|__setitem__"):
        write(net.W)


def test_what_is_read_in_two_ways_has_no_reading() -> None:
    net = Net((6, 6), lambda x, W: x @ W + F.linear(x, W))
    with readings({"W": net.W}) as found:
        net(torch.randn(2, 6))
    assert found == {}


def test_an_opened_parameter_looks_like_one_and_is_not_converted() -> None:
    net = Net((6, 2, 3), lambda x, W: x)
    open_parameter(net, "W", Reading(0, 1, 2, True))
    opened: Any = net.W
    assert (opened.shape, opened.ndim, len(opened), opened.dtype) == ((6, 2, 3), 3, 6, torch.float32)
    assert opened.size(1) == 2
    assert opened.to(torch.float32) is opened
    assert opened.to(torch.float64).dtype == opened.double().dtype == torch.float64
    assert opened.type(torch.float16).dtype == torch.float16
    assert net.W.layers[0].weight.dtype == torch.float32
    net.to(torch.float64)
    assert opened.dtype == torch.float64


@pytest.mark.parametrize("pattern", ["d n h", "(d) (d)", "(d)", "(d n h)", "(d) => (n)", "(d) (n) (h)", ""])
def test_patterns_are_checked(pattern: str) -> None:
    with pytest.raises(ValueError, match="a pattern must name each dimension once"):
        Reading.parse(pattern)


def test_a_pattern_of_other_dimensions_is_refused_before_anything_is_changed() -> None:
    net = Net((6, 2), lambda x, W: x)
    with pytest.raises(ValueError, match="the pattern names 3 dimensions, and the parameter has 2"):
        open_parameter(net, "W", Reading.parse("e (d) (n)"))
    assert isinstance(net.W, nn.Parameter)
