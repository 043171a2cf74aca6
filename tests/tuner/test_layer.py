"""The class of a tuner's layer is made of the name of the kind, and behaves as one that was written down."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapters import compress
from support.models import llama, token_inputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from reparam_peft import ReparamConfig
from reparam_peft.layers import kinds
from reparam_peft.layers.product import Product
from reparam_peft.numerics.decompositions import factorize
from reparam_peft.numerics.storage import Storage
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
    assert (
        {kind.name for kind in kinds.KINDS}
        == {"Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "Embedding"}
        <= set(vars(layer_module))
    )


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
        layer.update_layer("default", 2, product, Storage(4, 5, bias=True))
    assert list(layer.reparam_factors) == []


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("keep_base", [False, True])
def test_a_state_dict_is_loaded_strictly_into_a_model_of_its_config(keep_base: bool, form: str, tmp_path: Path) -> None:
    small = compress(llama(), target_modules="all-linear", r=8, form=form, keep_base=keep_base).eval()
    small.save_pretrained(tmp_path)
    again = get_peft_model(llama(), ReparamConfig.from_pretrained(tmp_path))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again.eval()(**token_inputs()).logits, small(**token_inputs()).logits)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }


def test_a_state_dict_without_factors_is_not_loaded_strictly(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], r=8)
    small.save_pretrained(tmp_path)
    again = get_peft_model(llama(), ReparamConfig.from_pretrained(tmp_path))
    state = {key: value for key, value in small.state_dict().items() if "layers.1.self_attn.q_proj" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.1.self_attn.q_proj.reparam_factors"):
        again.load_state_dict(state, strict=True)
