"""What a config takes of a model, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from support.adapters import compress
from support.model_state import assert_untouched
from support.models import llama, on_meta
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, FalconConfig, FalconForCausalLM, ResNetConfig, ResNetModel

from reparam_peft import ReparamConfig
from reparam_peft.arguments import ReparamWarning
from reparam_peft.tuner.selection import select_targets, with_targets


def test_what_is_selected_is_what_the_adapter_takes() -> None:
    options = {"target_modules": ["q_proj", "down_proj"], "keep": 0.5}
    model, config = llama(), ReparamConfig(**options)
    before = config.to_dict()
    selected = select_targets(model, config, "default")
    assert {name: target.rank for name, target in selected.items()} == compress(llama(), **options).peft_config[
        "default"
    ].rank_pattern
    assert config.to_dict() == before
    assert_untouched(model, llama())


def test_without_weights_the_same_is_selected() -> None:
    config = ReparamConfig(target_modules="all-linear", keep=0.5)
    assert select_targets(on_meta(), config, "default", loading=True).keys() == select_targets(llama(), config, "x").keys()


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`target_modules` .*'nothing'.* match no module of the model"):
        select_targets(llama(), ReparamConfig(target_modules=["nothing"]), "default")


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_a_model_without_linear_layers_is_called_that(target_modules: str | None) -> None:
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(ValueError, match=r"a ResNetModel has no linear layers, .* convolutions"):
        get_peft_model(model, ReparamConfig(target_modules=target_modules, keep=0.5))


@pytest.mark.parametrize("layers", [1, 2])
def test_without_names_all_linear_layers_of_the_blocks_are_taken(layers: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 40}
    falcon = FalconForCausalLM(FalconConfig(**sizes, num_hidden_layers=layers))  # of which there is no table
    names = select_targets(falcon, ReparamConfig(keep=0.5), "default")
    assert len(names) == 4 * layers
    assert all(name.startswith("transformer.h.") for name in names)
    last = select_targets(falcon, ReparamConfig(keep=0.5, layers_to_transform=[layers - 1]), "default")
    assert list(last) == [name for name in names if f".{layers - 1}." in name]
    albert = AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=layers, embedding_size=16))
    assert len(select_targets(albert, ReparamConfig(keep=0.5), "default")) == 6


class Attention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Nested(nn.Module):
    """A linear layer whose name is the ending of the name of a layer that cannot be factorised."""

    def __init__(self) -> None:
        super().__init__()
        self.out_proj, self.attention = nn.Linear(16, 16), Attention(16, 2)


def test_all_linear_takes_no_endings_of_names() -> None:
    config = ReparamConfig(target_modules="all-linear", r=2)
    with pytest.warns(ReparamWarning, match="attention.out_proj"):
        small = get_peft_model(Nested(), config)
    assert list(small.peft_config["default"].rank_pattern) == ["out_proj"]
    assert config.target_modules == "all-linear"


def test_a_config_with_its_targets_selects_them_again() -> None:
    config = ReparamConfig(target_modules="all-linear", r=2)
    assert list(select_targets(llama(), with_targets(config, ["model.layers.1.mlp.up_proj"]), "default")) == [
        "model.layers.1.mlp.up_proj"
    ]
