"""What kinds of layers say of themselves beside matrix and rows."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from reparam_peft.layers.kinds import layer_kind


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), Conv1D(2, 3), nn.Embedding(3, 2)], ids=lambda layer: type(layer).__name__)
def test_masks_of_tokens_fit_layers_that_see_one_position_at_a_time(layer: nn.Module) -> None:
    kind = layer_kind(layer)
    assert kind.has_positions
    assert kind.reading(layer) == ()


@pytest.mark.parametrize("layer_class", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d])
def test_convolutions_share_rows_with_those_of_their_geometry(layer_class: type[nn.Module]) -> None:
    layer, wider, other = layer_class(2, 3, 3), layer_class(2, 5, 3), layer_class(2, 3, 3, stride=2)
    kind = layer_kind(layer)
    assert not kind.has_positions
    assert kind.reading(layer) == kind.reading(wider) != kind.reading(other)


def test_a_bias_is_moved_where_all_outputs_have_one_mean_input() -> None:
    assert layer_kind(nn.Conv1d(4, 4, 1)).has_one_mean
    assert not layer_kind(nn.Conv1d(4, 4, 1, groups=2)).has_one_mean
