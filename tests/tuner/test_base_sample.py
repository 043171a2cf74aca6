from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import bert, llama, token_inputs
from torch import nn
from transformers import LlamaForCausalLM

from reparam_peft import ReparamConfig

QUERY = ReparamConfig(target_modules=["q_proj"], keep=0.5)


def saved(folder: Path, base: nn.Module, config: ReparamConfig = QUERY) -> ReparamConfig:
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    return model.peft_config["default"]


def test_a_sample_is_of_what_the_adapter_leaves_as_it_is() -> None:
    base = bert()
    config = get_peft_model(base, ReparamConfig(target_modules=["query", "key"], keep=0.5, task_type="SEQ_CLS")).peft_config
    sample = config["default"].base_sample
    original = dict(bert().named_parameters())
    assert 8 <= len(sample) <= 32
    assert not [name for name in sample if "query" in name or "key." in name or "classifier" in name]
    assert all(number == original[name].flatten()[index].item() != 0 for name, (index, number) in sample.items())


def other_seed() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(llama().config)


def fewer_rows() -> LlamaForCausalLM:
    model = llama()
    model.resize_token_embeddings(10)
    return model


def by_transformers(base: LlamaForCausalLM, folder: Path) -> None:
    base.load_adapter(str(folder))


ROUTES = [PeftModel.from_pretrained, lambda b, f: PeftModel.from_pretrained(b, f, low_cpu_mem_usage=True), by_transformers]


@pytest.mark.parametrize("load", ROUTES, ids=["PEFT", "low_cpu_mem_usage", "transformers"])
def test_another_base_is_told_on_every_route(load: Callable[..., object], tmp_path: Path) -> None:
    base = llama()
    base.name_or_path = "me/base"
    saved(tmp_path, base)
    with pytest.warns(
        UserWarning, match=r"The base model is not the one .* \(me/base\): number \d+ of '.*' is .* here, and was"
    ):
        load(other_seed(), tmp_path)


def test_fewer_rows_are_another_base(tmp_path: Path) -> None:
    saved(tmp_path, llama())
    with pytest.warns(UserWarning, match="number [0-9]+ of '.*' is missing here"):
        PeftModel.from_pretrained(fewer_rows(), tmp_path)


def more_rows() -> LlamaForCausalLM:
    model = llama()
    model.resize_token_embeddings(120)
    return model


SAME = [llama, lambda: llama().half(), lambda: llama().bfloat16(), more_rows, lambda: llama().to("meta")]


@pytest.mark.parametrize("base", SAME, ids=["float32", "float16", "bfloat16", "more rows", "meta"])
def test_the_same_base_in_another_dtype_or_with_more_rows_is_the_same(base: Callable[[], nn.Module], tmp_path: Path) -> None:
    saved(tmp_path, llama())
    model = base()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model is not")
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=next(model.parameters()).is_meta)


def test_a_sample_is_data(tmp_path: Path) -> None:
    config = saved(tmp_path, llama())
    config.base_sample = {"no.such.weight": [10**18, 1.0], "model.norm.weight": [2**62, 1.0]}
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="number 4611686018427387904 of 'model.norm.weight' is missing"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded(**token_inputs()).logits.isfinite().all()
