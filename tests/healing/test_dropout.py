"""Healing drops nothing, as the teacher drops nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.healing import BERT, ROWS, losses, small, trainer
from support.models import bert
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaModel,
    NllbMoeConfig,
    NllbMoeModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5EncoderModel,
    TrainerCallback,
)

from reparam_peft import ReparamConfig
from reparam_peft.healing.dropout import without_dropout

IDS = {"input_ids": torch.arange(24).view(2, 12) % 32}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
FOUR = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4}
RATE = 0.4


def bart() -> nn.Module:
    layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_layerdrop": RATE, "decoder_layerdrop": RATE, "vocab_size": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    rates = {"dropout": RATE, "attention_dropout": RATE, "activation_dropout": RATE}
    return BartModel(BartConfig(d_model=16, **layers, **heads, **rates, pad_token_id=1, bos_token_id=0, eos_token_id=2))


def gpt_neo() -> nn.Module:
    kinds = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 2, "hidden_size": 16, "vocab_size": 32}
    return GPTNeoModel(GPTNeoConfig(**kinds, attention_dropout=RATE, resid_dropout=RATE, embed_dropout=RATE))


# Rates in modules of dropout, in attributes that PyTorch's functions or attention read, in configs, of paths and of layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (lambda: BertModel(BertConfig(**SIZES, hidden_dropout_prob=RATE, attention_probs_dropout_prob=RATE)), IDS),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, attn_pdrop=RATE)), IDS),
    "bart": (bart, IDS),
    "t5": (lambda: T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)), IDS),
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZES, intermediate_size=16, attention_dropout=RATE)), IDS),
    "falcon": (lambda: FalconModel(FalconConfig(**SIZES, attention_dropout=RATE, hidden_dropout=RATE)), IDS),
    "bloom": (lambda: BloomModel(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32, hidden_dropout=RATE)), IDS),
    "gpt_neo": (gpt_neo, IDS),
    "swin": (
        lambda: SwinModel(SwinConfig(**FOUR, drop_path_rate=RATE)),
        {"pixel_values": torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)},
    ),
}


def output(model: nn.Module, batch: dict[str, Any], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_dropped_within_the_block_and_as_much_as_before_afterwards(kind: str) -> None:
    build, batch = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    expected = output(model.eval(), batch)
    model.train()
    dropped = output(model, batch)
    assert not torch.allclose(dropped, expected, atol=1e-3)
    with without_dropout(model):
        torch.testing.assert_close(output(model, batch), expected)
        assert torch.equal(output(model.eval(), batch), expected)
    model.train()
    assert torch.equal(output(model, batch), dropped)


def test_a_rate_that_evaluation_reads_stays() -> None:
    """NLLB-MoE scales the outputs of its experts by one, which the teacher would lose where it is the student itself."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_experts": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    rates = {"dropout": RATE, "moe_token_dropout": 0.2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    sizes = {"d_model": 16, "vocab_size": 32, "expert_capacity": 64}
    model = NllbMoeModel(NllbMoeConfig(**layers, **heads, **rates, **sizes, pad_token_id=1)).eval()
    batch = {**IDS, "decoder_input_ids": IDS["input_ids"]}
    expected = output(model, batch)
    with without_dropout(model):
        assert torch.equal(output(model, batch), expected)


def test_an_error_leaves_the_rates_as_they_were() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2))

    def fail() -> None:
        with without_dropout(model):
            assert [module.p for module in model] == [0, 0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.p for module in model] == [0.3, 0.2]


def dropping() -> nn.Module:
    """A classifier with much dropout, as `from_pretrained` would make it."""
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = RATE
    return model.eval()


def rates_of(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


class Rates(TrainerCallback):
    """Notes the rates with which a step of training begins."""

    rates: set[float]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.rates = rates_of(model)


@pytest.mark.parametrize(
    ("options", "drops"),
    [
        ({}, False),
        ({"distillation": 0.5}, False),
        ({"distillation": 0.0, "hidden": 1.0}, False),
        ({"distillation": 0.0}, True),
        ({"disable_dropout": False}, True),
        ({"disable_dropout": True, "distillation": 0.0}, False),
    ],
)
def test_what_learns_from_a_teacher_drops_nothing(options: dict[str, Any], drops: bool, tmp_path: Path) -> None:
    rows = [{**row, "labels": torch.tensor(0)} for row in ROWS[:4]]
    model = small(dropping, **BERT)
    made = trainer(tmp_path, model, rows, teacher=dropping(), max_steps=1, **options)
    noted = Rates()
    made.add_callback(noted)
    made.train()
    assert noted.rates == ({RATE} if drops else {0.0})
    assert rates_of(model) == {RATE}


@pytest.mark.parametrize("own", [False, True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(own: bool, tmp_path: Path) -> None:
    """With another model as teacher, or with itself without its adapter."""
    model = get_peft_model(dropping(), ReparamConfig(**BERT, r=48, keep_base=own))  # every rank
    made = trainer(tmp_path, model, ROWS, teacher=None if own else dropping(), max_steps=2)
    made.train()
    assert max(losses(made)) < 1e-6


class StochasticDepth(nn.Module):
    """As of torchvision."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


class Norm(StochasticDepth):
    """A module with another p."""


def test_a_rate_is_known_by_its_class_and_the_power_of_a_norm_stays() -> None:
    model = nn.Sequential(StochasticDepth(0.3), nn.AlphaDropout(0.2), Norm(2.0))
    with without_dropout(model):
        assert [module.p for module in model] == [0.0, 0.0, 2.0]
    assert [module.p for module in model] == [0.3, 0.2, 2.0]


def test_a_lora_keeps_its_own_dropout() -> None:
    model = nn.ModuleDict({"lora_dropout": nn.ModuleDict({"default": nn.Dropout(0.3)}), "beside": nn.Dropout(0.2)})
    with without_dropout(model):
        assert (model["lora_dropout"]["default"].p, model["beside"].p) == (0.3, 0.0)


@pytest.mark.parametrize("value", ["no", 1])
def test_another_value_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"`disable_dropout` must be True or False, got {value!r}"):
        trainer(tmp_path, small(dropping, **BERT), teacher=dropping(), disable_dropout=value)
