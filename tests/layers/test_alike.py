"""Subclasses are told from their base class by what they compute, also where they have no numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisualEmbeddingTable

from reparam_peft.layers.kinds import layer_kind


class Clipped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-100, 100)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class WithAdapter(nn.Linear):
    """Whose second matrix starts as zero."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.more = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.more.T


class Grouped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return (input.unflatten(-1, (2, -1)) @ self.weight.unflatten(0, (2, -1)).mT).flatten(-2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "alike"),
    [
        (lambda: FalconLinear(16, 20), True),
        (lambda: FalconLinear(16, 20, bias=False), True),
        (lambda: BartScaledWordEmbedding(20, 16, 3, 4.0), True),
        (lambda: Gemma3TextScaledWordEmbedding(20, 16, 3, 4.0), True),
        (lambda: BartLearnedPositionalEmbedding(20, 16), False),
        (lambda: Ovis2VisualEmbeddingTable(20, 16), False),
        (lambda: Clipped(16, 20), False),
        (lambda: Dropping(16, 20), False),
        (lambda: WithAdapter(16, 20), False),
        (lambda: Grouped(16, 20), False),
    ],
)
def test_a_subclass_is_taken_where_it_computes_the_same(make: type[nn.Module], alike: bool, device: str) -> None:
    with torch.device(device):
        layer = make()
    state = torch.get_rng_state()
    if alike:
        assert layer_kind(layer).shape(layer) in ((20, 16), (16, 20))
    else:
        with pytest.raises(TypeError, match="computes differently"):
            layer_kind(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
