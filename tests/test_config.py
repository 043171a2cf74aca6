"""`ReparamConfig`: what it refuses, what it writes, and when it says that weights are about to be loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.config.fields import ALLOCATIONS, METHODS
from reparam_peft.numerics.storage import FORMS

# What `get_peft_model`, which gets no data, refuses; all of them are valid in a config.
NEEDS_DATA: list[tuple[str, Any, str]] = [
    ("method", "whitened", "`method='whitened'` needs calibration data"),
    ("method", "autoencoder", "`method='autoencoder'` needs calibration data"),
    ("allocation", "loss", "`allocation='loss'` needs calibration data"),
    ("input_metric", "none", "`input_metric` has an effect with calibration data only"),
    ("output_metric", "diagonal", "`output_metric` has an effect with calibration data only"),
    ("shrinkage", 0.0, "`shrinkage` has an effect with calibration data only"),
    ("output_shrinkage", 0.5, "`output_shrinkage` has an effect with calibration data only"),
    ("rank_multiple", 8, "`rank_multiple` has an effect with calibration data only"),
    ("floor", 0.0, "`floor` has an effect with calibration data only"),
    ("ceiling", 1.0, "`ceiling` has an effect with calibration data only"),
]


@pytest.mark.parametrize(("name", "value", "message"), NEEDS_DATA)
def test_what_needs_data_is_refused_where_there_is_none(name: str, value: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = ReparamConfig(target_modules=["0"], **{name: value})
    with pytest.raises(ValueError, match=f"{message}.*`reparam_peft.compress"):
        get_peft_model(model, config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_every_choice_that_a_config_takes_is_data_free_or_refused_above() -> None:
    refused = {(name, value) for name, value, _ in NEEDS_DATA}
    for name, values in (("method", METHODS), ("allocation", ALLOCATIONS), ("form", FORMS)):
        for value in values:
            model = nn.Sequential(nn.Linear(8, 8))
            if (name, value) not in refused:
                get_peft_model(model, ReparamConfig(target_modules=["0"], **{name: value}))
