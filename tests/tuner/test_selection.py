"""What a config takes of a model, before anything is changed."""

from __future__ import annotations

import pytest
from support.adapters import compress
from support.model_state import assert_untouched
from support.models import llama, on_meta

from reparam_peft import ReparamConfig
from reparam_peft.tuner.selection import select_targets


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
