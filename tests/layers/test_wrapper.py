"""What is known of a target, whether a layer of ours is around it or not."""

from __future__ import annotations

import pytest
import torch
from support.adapters import compress
from support.models import net
from support.narrow import narrowed
from torch import nn

from reparam_peft.layers.kinds import layer_kind
from reparam_peft.layers.wrapper import features, kind_and_layer, matrix_shape


def test_a_wrapped_layer_has_the_matrix_of_its_base_layer_and_the_features_of_its_adapter() -> None:
    plain = net()
    small = narrowed(net(), [(["first"], "second")], keep_base=True)
    for name in ("first", "second"):
        layer, module = plain.get_submodule(name), small.get_submodule(f"base_model.model.{name}")
        assert kind_and_layer(module) == (layer_kind(layer), module.base_layer)
        assert matrix_shape(module) == matrix_shape(layer) == features(layer)
    first, second = (small.get_submodule(f"base_model.model.{name}") for name in ("first", "second"))
    assert (features(first), features(second)) == ((18, 20), (16, 18))
    with small.disable_adapter():
        assert features(first) == (30, 20)
    small.merge_adapter()
    assert features(first) == (30, 20)
    assert features(compress(net(), target_modules=["first"], r=4).base_model.model.first) == (30, 20)


def test_other_methods_layers_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="another PEFT method already"):
        matrix_shape(lora.base_model.model[0])
    assert torch.is_tensor(lora.base_model.model[0].weight)
