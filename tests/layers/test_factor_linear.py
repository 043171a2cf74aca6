"""The linear layers that products consist of."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrize

from reparam_peft.layers import factor_linear
from reparam_peft.layers.factor_linear import FactorLinear


@pytest.mark.parametrize("shape", [(1, 600), (1, 1, 600), (600,), (2, 600), (0, 600)])
def test_single_rows_agree_with_the_plain_product(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(factor_linear, "SINGLE_ROW_LEAST", 600 * 500)
    layer = FactorLinear(600, 500)
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert_close(layer(x), expected)
        assert layer(x).shape == expected.shape
    assert layer(x).requires_grad, "autograd needs the plain product"


@pytest.mark.parametrize("threads", [1, 2])
def test_single_rows_take_the_fast_product_only_where_it_is_safe(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(factor_linear, "SINGLE_ROW_PRODUCT", lambda x, weight, *rest: calls.append(1) or x @ weight.mT)
    monkeypatch.setattr(factor_linear, "SINGLE_ROW_LEAST", 600 * 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
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
    assert calls == ([1] if threads > 1 else []), "one thread gains nothing"


def test_a_parametrised_weight_is_the_one_that_multiplies() -> None:
    class Negative(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return -weight

    layer, x = FactorLinear(3, 2), torch.randn(4, 3)
    expected = nn.functional.linear(x, -layer.weight, layer.bias)
    parametrize.register_parametrization(layer, "weight", Negative())
    assert torch.equal(layer(x), expected)
