"""Each architecture's default targets against a model of that architecture on the meta device: all hit, and none forgotten."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from peft import get_peft_model
from support.models import llama
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pytorch_utils import Conv1D

from reparam_peft import ReparamConfig
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.tuner.target_modules import TARGET_MODULES

# Names that exist only in some variants of the architecture; each variant has one of these sets in full.
VARIANTS: dict[str, list[set[str]]] = {
    **{model_type: [{"wi"}, {"wi_0", "wi_1"}] for model_type in ("t5", "mt5", "umt5", "longt5")},
    **{model_type: [set(), {"q_attn"}] for model_type in ("gpt2", "gpt_bigcode")},
    "dinov2": [
        attention | mlp
        for attention, gated in (
            ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
            ({"query", "key", "value", "output.dense"}, {"weights_in", "weights_out"}),
        )
        for mlp in ({"fc1", "fc2"}, gated)
    ],
}
# Options of the config that change the names of a block's linear layers, by model type.
OTHER_CONFIGS = [
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("umt5", {"feed_forward_proj": "relu"}),
    ("longt5", {"feed_forward_proj": "gated-gelu", "encoder_attention_type": "transient-global"}),
    ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16}),
    ("gpt2", {"add_cross_attention": True}),
    ("bert", {"is_decoder": True, "add_cross_attention": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("dinov2", {"use_swiglu_ffn": True}),
    ("mpt", {"no_bias": False}),
]
HEADS = [
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]


@cache
def modules(
    model_type: str, options: tuple[tuple[str, object], ...] = (), auto_class: type = AutoModel
) -> dict[str, nn.Module]:
    """Names and modules of a model of the architecture, in its default size, without weights."""
    config = AutoConfig.for_model(model_type, **dict(options))
    with torch.device("meta"):
        return dict(auto_class.from_config(config).named_modules())


def hits(name: str, endings: list[str]) -> list[str]:
    """The endings that match a module's name, as PEFT matches them."""
    return [ending for ending in endings if name == ending or name.endswith(f".{ending}")]


def forgotten(model_type: str, names_and_modules: dict[str, nn.Module]) -> set[str]:
    """Linear layers inside the numbered blocks that no ending matches, numbers left out."""
    return {
        re.sub(r"\.\d+\.", ".*.", name)
        for name, module in names_and_modules.items()
        if isinstance(module, (nn.Linear, Conv1D))
        and re.search(r"\.\d+\.", name)
        and min(module.weight.shape) >= 64  # a router or a gate of a few outputs is no projection
        and not hits(name, TARGET_MODULES[model_type])
    }


@pytest.mark.parametrize("model_type", TARGET_MODULES)
def test_every_name_is_that_of_a_layer_that_can_be_factorised(model_type: str) -> None:
    found = set()
    for name, module in modules(model_type).items():
        for ending in hits(name, TARGET_MODULES[model_type]):
            assert layer_kind(module).layer_class in (nn.Linear, Conv1D), name
            found.add(ending)
    variants = VARIANTS.get(model_type, [set()])
    assert set(TARGET_MODULES[model_type]) - set().union(*variants) <= found
    assert any(variant <= found for variant in variants)


@pytest.mark.parametrize("model_type", TARGET_MODULES)
def test_no_linear_layer_of_a_block_is_forgotten(model_type: str) -> None:
    blocks = modules(model_type)
    assert sum(isinstance(m, (nn.Linear, Conv1D)) and bool(re.search(r"\.\d+\.", n)) for n, m in blocks.items()) >= 8
    assert forgotten(model_type, blocks) == set()


@pytest.mark.parametrize(("model_type", "options"), OTHER_CONFIGS, ids=str)
def test_no_linear_layer_of_a_variant_is_forgotten(model_type: str, options: dict[str, object]) -> None:
    assert forgotten(model_type, modules(model_type, tuple(options.items()))) == set()


@pytest.mark.parametrize("model_type", TARGET_MODULES)
def test_only_blocks_are_targeted_and_no_head(model_type: str) -> None:
    """A head for a new task starts from random weights, which nothing is gained by factorising."""
    config_class = type(AutoConfig.for_model(model_type))
    for auto_class in (AutoModel, *HEADS):
        if config_class not in auto_class._model_mapping:
            continue
        outside = {
            name
            for name in modules(model_type, (), auto_class)
            if hits(name, TARGET_MODULES[model_type]) and not re.search(r"\.\d+\.", name)
        }
        assert outside == set(), auto_class.__name__


def test_names_are_listed_once() -> None:
    for model_type, names in TARGET_MODULES.items():
        assert len(names) == len(set(names)), model_type


def test_the_defaults_are_used_where_no_targets_are_given() -> None:
    model = get_peft_model(llama(), ReparamConfig(r=4))
    ranks = model.peft_config["default"].rank_pattern
    endings = {name.rsplit(".", 1)[-1] for name in ranks}
    assert endings == set(TARGET_MODULES["llama"])
    assert len(ranks) == 2 * len(endings)


def test_an_architecture_that_is_not_listed_needs_targets() -> None:
    class Unknown(nn.Module):
        config = {"model_type": "unheard-of"}

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Unknown(), ReparamConfig(r=2))
