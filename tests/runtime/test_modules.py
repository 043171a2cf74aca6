"""Modules of a model that is not ours: replaced for a while, and what they predict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from peft import get_peft_model
from support.models import Residual, bert, convnet, gpt2, llama, masked_lm, skipping, t5
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MimiEncoderConfig, MimiEncoderModel

from reparam_peft import ReparamConfig
from reparam_peft.runtime.modules import (
    is_offloaded,
    leaving_no_graph,
    predicts_next_token,
    replaced,
    uncompiled,
    without_cache,
)


def test_modules_are_replaced_for_a_while() -> None:
    model = skipping()
    before, other = model.stages[1], Residual()
    with replaced(model, {"stages.1": other}):
        assert model.stages[1] is other
        with pytest.raises(AttributeError), replaced(model, {"stages.0": other, "stages.9": other}):
            pass
    assert model.stages[1] is before


def test_which_models_predict_the_next_token() -> None:
    wrapped = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r=4))
    assert all(predicts_next_token(model) for model in (llama(), gpt2(), wrapped))
    assert not any(predicts_next_token(model) for model in (t5(), masked_lm(), bert(), convnet()))


def test_a_pass_that_generates_nothing_has_no_cache() -> None:
    wrapped = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r=4))
    for model in (llama(), gpt2(), t5(), wrapped, torch.compile(llama(), backend="eager")):
        assert without_cache(model, {"x": 1}) == {"use_cache": False, "x": 1}
        assert without_cache(model, {"use_cache": True}) == {"use_cache": True}
    assert without_cache(convnet(), {"x": 1}) == {"x": 1}
    # A part that decides on its cache itself, and hands other keywords on beside.
    assert without_cache(MimiEncoderModel(MimiEncoderConfig(num_hidden_layers=1)), {"x": 1}) == {"x": 1}


def test_compiled_modules_run_their_own_code_for_a_while() -> None:
    model = skipping()
    model.stages[0].compile(backend="eager")
    model.stages[1] = torch.compile(model.stages[1], backend="eager")
    x, seen = torch.ones(2, 8), []
    expected = model(x)
    before = [dict(vars(stage)) for stage in model.stages]
    for name in ("0", "1._orig_mod"):
        model.stages.get_submodule(name).linear.register_forward_hook(lambda *_: seen.append(1))
    with uncompiled(model):
        assert torch.equal(model(x), expected)
    assert len(seen) == 2
    assert [dict(vars(stage)) for stage in model.stages] == before


def test_offloaded_layers_are_told_by_their_hooks() -> None:
    model = skipping()
    attach_align_device_hook(model, execution_device=torch.device("cpu"))
    assert not is_offloaded(model.stages[0].linear)
    model = skipping()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert is_offloaded(model.stages[0].linear)
    remove_hook_from_submodules(model)
    assert not is_offloaded(model.stages[0].linear)


class Recurrent(nn.Module):
    """Keeps states of its last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.states: list[Tensor] = []
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        self.states = [self.last]
        return self.last


def test_no_graph_is_left_in_a_model() -> None:
    model = Recurrent()
    with leaving_no_graph(model):
        y = model(torch.ones(4))
    copied = copy.deepcopy(model)
    assert torch.equal(copied.states[0], y)
    assert torch.equal(copied.last, y)


def test_a_model_that_says_itself_whether_it_caches_is_not_told() -> None:
    class Classifier(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return self.model(input_ids, use_cache=False, **kwargs)

    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}
    model = Classifier(llama().config).eval()
    assert without_cache(model, batch).keys() == batch.keys()
    assert model(**without_cache(model, batch)).last_hidden_state.shape[:2] == (1, 3)
