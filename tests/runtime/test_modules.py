"""Modules of a model that is not ours: replaced for a while, and what they predict."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from support.models import Residual, bert, convnet, gpt2, llama, masked_lm, skipping, t5

from reparam_peft import ReparamConfig
from reparam_peft.runtime.modules import predicts_next_token, replaced


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
