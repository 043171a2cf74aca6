"""A config out of a checkpoint that is used without its weights."""

from __future__ import annotations

import torch
from peft import get_peft_model
from support.models import llama, token_inputs

from reparam_peft import ReparamConfig
from reparam_peft.tuner.awaited import factorize_awaited
from reparam_peft.tuner.layer import reparam_layers


def test_the_matrix_is_factorised_where_no_factors_have_arrived() -> None:
    config = ReparamConfig(target_modules=["q_proj"], r=8, inference_mode=True)
    config.calibration_tokens = 1  # as resolved in a checkpoint
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    assert all(layer.arrivals.awaited for _, layer in reparam_layers(model))
    factorize_awaited(model.base_model.model)
    expected = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], r=8))
    with torch.no_grad():
        torch.testing.assert_close(model(**token_inputs()).logits, expected(**token_inputs()).logits)
