from __future__ import annotations

import copy

import torch
from support.tolerances import assert_close
from torch import nn

from reparam_peft.layers.factorized_kinds import FactorizedEmbedding
from reparam_peft.layers.tied_head import TiedHead
from reparam_peft.numerics.decompositions import Factors

FORMS = ("factors", "pivot")


def shared(form: str, bias: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    table = FactorizedEmbedding(nn.Embedding(11, 6), 3, form).double()
    table.set_factors(Factors(torch.randn(6, 3).double(), torch.randn(3, 11).double()))
    return nn.ModuleDict({"embed": table, "head": TiedHead(nn.Linear(6, 11, bias=bias).double(), table)})


def test_a_head_multiplies_by_the_transposed_product() -> None:
    for form in FORMS:
        for bias in (False, True):
            model, x = shared(form, bias), torch.randn(2, 4, 6).double()
            table = model["embed"].matrix(torch.float64).mT  # type: ignore[operator]
            expected = nn.functional.linear(x, table, model["head"].bias)  # type: ignore[arg-type]
            assert_close(model["head"](x), expected)
            assert_close(model["embed"](torch.arange(11)), table)


def test_it_owns_nothing_of_the_table_and_goes_along_with_it() -> None:
    model = shared("factors")
    assert sorted(model.state_dict()) == ["embed.A.weight", "embed.B.weight", "head.bias"]
    copied = copy.deepcopy(model)
    assert copied["head"].table is copied["embed"]
    copied["embed"].B.weight.data.zero_()  # type: ignore[union-attr, operator]
    x = torch.randn(3, 6).double()
    assert_close(copied["head"](x), copied["head"].bias.expand(3, -1))  # type: ignore[union-attr, operator]
    assert not torch.equal(model["head"](x), copied["head"](x))
    model["head"](x).sum().backward()
    model["embed"](torch.tensor([2])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_becomes_the_linear_layer_again() -> None:
    layer = nn.Linear(6, 11)
    bias = layer.bias
    head = TiedHead(layer, shared("factors")["embed"]).eval()
    weight = nn.Parameter(torch.randn(11, 6))
    assert layer.weight is None
    again = head.untied(weight)
    assert again is layer
    assert again.weight is weight
    assert again.bias is bias
    assert not again.training
