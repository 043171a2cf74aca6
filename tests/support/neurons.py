"""Neurons taken out of a model by hand: cut off, and set to zero."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from reparam_peft.layers.neuron_groups import NeuronGroup, rows_of
from reparam_peft.layers.wrapper import kind_and_layer


def difference_when_cut(model: nn.Module, groups: Iterable[NeuronGroup], batch: dict[str, Tensor]) -> float:
    """The largest difference of outputs between a model that lacks neurons and one in which their columns are zero.

    Args:
        model: stays as it is.
        groups: of which about every other neuron goes.
        batch: for both.
    """
    cut, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    for group in groups:
        kept = torch.arange(group.neurons)[torch.arange(group.neurons) * 5 % 7 < 4]
        for name, layout in group.producers:
            _cut(cut.get_submodule(name), 0, rows_of(layout, kept, group.neurons))
        _cut(cut.get_submodule(group.consumer), 1, kept)
        gone = torch.ones(group.neurons, dtype=torch.bool).index_fill(0, kept, False)
        kind, layer = kind_and_layer(zeroed.get_submodule(group.consumer))
        kind.own_matrix(layer)[:, gone] = 0
    with torch.no_grad():
        pairs = zip(_tensors(cut(**batch)), _tensors(zeroed(**batch)), strict=True)
        return max(float((one - other).abs().max()) for one, other in pairs)


def _cut(layer: Any, dim: int, kept: Tensor) -> None:
    kind = kind_and_layer(layer)[0]
    matrix = kind.own_matrix(layer).index_select(dim, kept)
    layer.weight = nn.Parameter(kind.weight(matrix, matrix.shape))
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept])
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = matrix.shape
    else:
        layer.nf, layer.nx = matrix.shape


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
