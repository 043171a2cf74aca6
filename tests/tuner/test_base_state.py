"""The base model's state dict, by PEFT's functions, where parameters are open."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from support.models import gpt_oss, qwen_moe, xlnet

from reparam_peft import ReparamConfig


@pytest.mark.parametrize(
    ("build", "parameters"), [(qwen_moe, "all-experts"), (gpt_oss, "all-experts"), (xlnet, ["rel_attn.q"])]
)
def test_opened_parameters_have_the_names_of_the_model(build: Any, parameters: Any) -> None:
    expected = build().state_dict()
    kept = get_peft_model(build(), ReparamConfig(target_modules=[], target_parameters=parameters, keep=0.5, keep_base=True))
    state = peft.get_base_model_state_dict(kept)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    doubled = {name: 2 * value for name, value in expected.items()}
    assert peft.set_base_model_state_dict(kept, doubled).missing_keys == []
    assert all(torch.equal(value, doubled[name]) for name, value in peft.get_base_model_state_dict(kept).items())
    dropped = peft.get_base_model_state_dict(
        get_peft_model(build(), ReparamConfig(target_modules=[], target_parameters=parameters, keep=0.5))
    )
    assert dropped.keys() < expected.keys()
