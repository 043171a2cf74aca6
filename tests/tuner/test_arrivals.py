"""Arrivals: seen in the parameters whoever fills them in, checked, and followed by what was postponed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.numerics.decompositions import Factors, factorize
from reparam_peft.tuner.arrivals import Arrivals


def waiting(*names: str, device: str = "cpu", bias: bool = False) -> tuple[Arrivals, nn.ModuleDict]:
    """Arrivals of adapters of rank 2 for a matrix (4, 5)."""
    modules = nn.ModuleDict()
    arrivals = Arrivals(modules)
    for name in names:
        modules[name] = FactorizedLinear(5, 4, 2, bias=bias, device=device)
        arrivals.expect(name, modules[name])
    return arrivals, modules


def test_factors_arrive_when_every_parameter_is_filled_in() -> None:
    arrivals, modules = waiting("default")
    A, B = torch.randn(4, 2), torch.randn(2, 5)
    assert not arrivals.has_arrived("default"), "NaN"
    modules["default"].A.weight.data.copy_(A)
    assert not arrivals.has_arrived("default"), "half of it"
    modules["default"].B.weight.data.copy_(B)
    assert arrivals.has_arrived("default")
    arrivals.accept_arrived()
    assert arrivals.awaited == set()


def test_parameters_on_meta_have_not_arrived() -> None:
    arrivals, modules = waiting("default", device="meta")
    assert not arrivals.has_arrived("default")
    modules["default"].set_factors(Factors(torch.ones(4, 2), torch.ones(2, 5)))  # other parameters, as some loaders do
    assert arrivals.has_arrived("default")


def test_what_is_postponed_goes_once_with_the_last_arrival() -> None:
    arrivals, _ = waiting("one", "other")
    calls: list[str] = []
    arrivals.postpone(lambda: calls.append("dropped"))
    arrivals.factorize("one", torch.randn(4, 5), None)
    assert calls == []
    arrivals.stop_waiting("other")
    arrivals.stop_waiting("other")
    assert calls == ["dropped"]


def test_an_adapter_that_is_taken_away_has_not_arrived() -> None:
    arrivals, _ = waiting("default")
    calls: list[str] = []
    arrivals.postpone(lambda: calls.append("dropped"))
    arrivals.forget("default")
    arrivals.accept_arrived()
    assert (arrivals.awaited, calls) == (set(), [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_and_still_awaited(value: float) -> None:
    arrivals, modules = waiting("default")
    modules["default"].set_factors(Factors(torch.ones(4, 2), torch.ones(2, 5)))
    modules["default"].A.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="the loaded factors of adapter 'default' contain NaN or infinite values"):
        arrivals.accept_arrived()
    assert arrivals.awaited == {"default"}


def test_what_never_came_is_named() -> None:
    arrivals, _ = waiting("default")
    with pytest.raises(RuntimeError, match=r"the factors of adapter 'default' were never loaded.*`load_adapter`"):
        arrivals.check_complete()


def test_factorises_into_the_same_parameters() -> None:
    arrivals, modules = waiting("default", bias=True)
    before = list(modules["default"].parameters())
    W, bias = torch.randn(4, 5), torch.randn(4)
    arrivals.factorize("default", W, bias)
    assert all(one is other for one, other in zip(before, modules["default"].parameters(), strict=True))
    A, B = modules["default"].factors
    expected = factorize(W, 2)
    torch.testing.assert_close(A @ B, expected.A @ expected.B)
    assert torch.equal(modules["default"].bias, bias)
    assert arrivals.awaited == set()


def test_a_copy_waits_for_its_own_modules() -> None:
    arrivals, modules = waiting("default")
    copied, copied_modules = copy.deepcopy((arrivals, modules))
    copied_modules["default"].set_factors(Factors(torch.ones(4, 2), torch.ones(2, 5)))
    copied.accept_arrived()
    assert (copied.awaited, arrivals.awaited) == (set(), {"default"})
