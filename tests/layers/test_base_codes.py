"""A quantised layer of the base model as a part of what corrects it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from reparam_peft.layers.base_codes import BaseCodes


class Doubling:
    """A kind whose layers hold half of their matrix."""

    def own_matrix(self, layer: nn.Linear) -> Tensor:
        return layer.weight * 2

    def dtype(self, layer: nn.Linear) -> torch.dtype:
        return layer.weight.dtype


def test_the_layer_computes_and_stays_the_base_models() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    codes = BaseCodes(layer, Doubling())
    x = torch.randn(2, 4)
    assert torch.equal(codes(x), layer(x.to(torch.bfloat16)).float())
    assert torch.equal(codes.matrix(), layer.weight.detach() * 2)
    assert not codes.state_dict()
    assert not list(codes.children())
    holder = nn.ModuleList([layer, codes])
    copied = copy.deepcopy(holder)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert not copied[1].matrix().any(), "of a model that is copied, it is the copy's layer"
