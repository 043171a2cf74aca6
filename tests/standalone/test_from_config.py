from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_in_model
from peft import get_peft_model
from support.models import gpt2, llama, t5, token_inputs
from support.narrow import narrowed
from support.standalone import NARROW
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from reparam_peft import ReparamConfig
from reparam_peft.layers.factorized import FactorizedModule


def standalone(build: Callable[[], nn.Module], form: str = "factors", quantize: str | None = None) -> PreTrainedModel:
    targets = ["embed_tokens", "q_proj", "down_proj"] if build is llama else "all-linear"
    if form == NARROW:
        return narrowed(build()).to_standalone(quantize=quantize).eval()
    config = ReparamConfig(target_modules=targets, r=16, form=form)
    return get_peft_model(build(), config).to_standalone(quantize=quantize).eval()


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("build", "form"), [*product([llama, gpt2, t5], ["factors", "pivot"]), (gpt2, NARROW)])
def test_a_model_from_the_config_takes_the_state_dict_strictly(
    build: Callable[[], nn.Module], form: str, from_file: bool, tmp_path: Path
) -> None:
    model = standalone(build, form)
    inputs = {**token_inputs(), **({"decoder_input_ids": token_inputs()["input_ids"]} if build is t5 else {})}
    config = model.config
    if from_file:
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if build is t5 else AutoModelForCausalLM
    made = auto.from_config(config).eval()
    assert made(**inputs).logits.isfinite().all()
    made.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(made.eval()(**inputs).logits, model(**inputs).logits)
    for name, module in made.named_modules():  # as a model that reads the weight itself would
        if isinstance(module, FactorizedModule):
            assert torch.equal(module.weight.detach() + 0, model.get_submodule(name).weight.detach() + 0)
    made.save_pretrained(tmp_path / "again")
    assert torch.equal(auto.from_pretrained(tmp_path / "again")(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_another_head_has_the_same_layers(auto: type) -> None:
    model = standalone(llama)
    made = auto.from_config(model.config)
    names = {name.removeprefix("model.") for name, module in made.named_modules() if isinstance(module, FactorizedModule)}
    assert names == {name.removeprefix("model.") for name in model.config.quantization_config.layers}
    assert made.dtype == model.dtype


def test_without_memory_a_checkpoint_is_loaded_into_it(tmp_path: Path) -> None:
    model = standalone(llama, "pivot")
    model.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert all(parameter.is_meta for parameter in made.parameters())
    load_checkpoint_in_model(made, tmp_path, device_map={"": "cpu"})
    assert torch.equal(made.eval()(**token_inputs()).logits, model(**token_inputs()).logits)


def test_quantised_layers(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = standalone(llama, quantize="int8")
    made = AutoModelForCausalLM.from_config(model.config).eval()
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert made(**token_inputs()).logits.isfinite().all()


def test_other_configs_are_as_before() -> None:
    made = AutoModelForCausalLM.from_config(llama().config)
    assert not [module for module in made.modules() if isinstance(module, FactorizedModule)]
