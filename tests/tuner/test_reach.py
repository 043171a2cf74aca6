"""A config that leaves out most of a model says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from peft import get_peft_model
from support.batches import text
from support.models import llama, qwen_moe

from reparam_peft import ReparamConfig, compress
from reparam_peft.arguments import ReparamWarning

BATCHES = [text([24, 20, 24, 17], 24, seed=seed) for seed in range(3)]


def told(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if issubclass(w.category, ReparamWarning) and "reaches" in str(w.message)]


@pytest.mark.parametrize("calibrated", [False, True])
def test_left_out_experts_are_told_once_with_the_remedy(calibrated: bool) -> None:
    config = ReparamConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], keep=0.5)

    def make() -> None:
        compress(qwen_moe(), config, BATCHES, progress=False) if calibrated else get_peft_model(qwen_moe(), config)

    (message,) = told(make)
    assert "model.layers.*.mlp.experts.gate_up_proj" in message
    assert "target_parameters='all-experts'" in message
    assert "`keep=0.5` is of what it reaches" in message


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (qwen_moe, {"target_modules": "all-linear", "target_parameters": "all-experts"}),
        (llama, {"target_modules": "all-linear"}),
        (llama, {"target_modules": ["q_proj"]}),  # which was asked for
        (llama, {}),
    ],
)
def test_nothing_is_told_otherwise(build: Any, options: dict[str, Any]) -> None:
    assert told(lambda: get_peft_model(build(), ReparamConfig(**options, keep=0.5))) == []


def test_whatever_is_left_out_of_all_there_is_is_told() -> None:
    config = ReparamConfig(target_modules="all-linear", exclude_modules=["gate_proj", "up_proj", "down_proj"])
    (message,) = told(lambda: get_peft_model(llama(), config))
    assert "model.layers.*.mlp" in message
    assert "experts" not in message
