"""The class of a tuner's layer is made of the name of the kind, and behaves as one that was written down."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from reparam_peft.layers import kinds
from reparam_peft.layers.product import Product
from reparam_peft.numerics.decompositions import factorize
from reparam_peft.tuner import layer as layer_module
from reparam_peft.tuner.layer import ReparamLayer, reparam_layer

LAYERS = {
    "Linear": lambda: nn.Linear(5, 4),
    "Conv1D": lambda: Conv1D(4, 5),
    "Conv2d": lambda: nn.Conv2d(3, 4, 2),
    "Embedding": lambda: nn.Embedding(5, 4),
}
NAMES = {"Linear": "Linear", "Conv1D": "Linear", "Conv2d": "Conv2d", "Embedding": "Embedding"}

layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_the_class_is_named_after_the_kind(name: str) -> None:
    layer = reparam_layer(LAYERS[name]())
    assert isinstance(layer, (ReparamLayer, BaseTunerLayer))
    assert type(layer) is getattr(layer_module, NAMES[name])
    assert (type(layer).__name__, type(layer).__module__) == (NAMES[name], "reparam_peft.tuner.layer")
    assert repr(layer).startswith(f"reparam.{NAMES[name]}(")
    assert type(layer).__doc__


def test_every_kind_has_its_class_before_a_layer_is_made() -> None:
    assert {kind.name for kind in kinds.KINDS} == {"Linear", "Conv2d", "Embedding"} <= set(vars(layer_module))


@layers
@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"])
def test_a_layer_is_copied_and_pickled(name: str, again: object) -> None:
    layer = reparam_layer(LAYERS[name]())
    layer.update_layer("default", 2, Product(factorize(layer.source_matrix(), 2)))
    layer.drop_base_weight()
    other = again(layer)
    assert type(other) is type(layer)
    assert torch.equal(other.dense_matrix("default"), layer.dense_matrix("default"))


@layers
def test_a_layer_that_waits_is_copied_with_what_it_waits_for(name: str) -> None:
    layer = reparam_layer(LAYERS[name]())
    matrix = layer.source_matrix()
    layer.update_layer("default", 2, None)
    layer.drop_base_weight()
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    other.factorized("default").set_factors(factorize(matrix, 2))
    other.eval()
    assert other.base_weight_dropped
    assert not layer.base_weight_dropped


def test_a_kind_that_is_added_needs_no_line_in_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(nn.Linear):
        pass

    class RenamedKind(kinds.LinearKind):
        layer_class = Renamed
        name = "Renamed"

    monkeypatch.setattr(kinds, "KINDS", (RenamedKind(), *kinds.KINDS))
    layer = reparam_layer(Renamed(5, 4))
    assert (type(layer).__name__, type(reparam_layer(nn.Linear(5, 4))).__name__) == ("Renamed", "Linear")
    assert pickle.loads(pickle.dumps(type(layer))) is type(layer)


def test_a_product_without_the_bias_that_is_asked_for_is_refused() -> None:
    layer = reparam_layer(nn.Linear(5, 4))
    product = Product(factorize(layer.source_matrix(), 2))
    with pytest.raises(ValueError, match="`product` lacks the bias"):
        layer.update_layer("default", 2, product, bias=True)
    assert list(layer.reparam_factors) == []
