"""Angles between the inputs that neighbouring layers read."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.models import llama
from support.narrow import kept_neurons, narrowed

from reparam_peft import ReparamConfig, input_angles, principal_angles


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_angles_of_a_model(form: str) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", keep=0.5, form=form))
    angles = input_angles(model)
    assert set(angles) == {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    factors = [layer.self_attn.q_proj.reparam_factors["default"].factors.B for layer in model.base_model.model.model.layers]
    torch.testing.assert_close(angles["self_attn.q_proj"][0], principal_angles(*factors))
    with pytest.raises(ValueError, match="no factorised layers"):
        input_angles(llama())


def test_inputs_that_are_left_out_count_as_zero() -> None:
    small, groups = narrowed(llama()), [kept_neurons(160, number) for number in range(2)]
    layers = [layer.mlp.down_proj for layer in small.base_model.model.model.layers]
    rows = [torch.zeros(layer.r["default"], 160) for layer in layers]
    for whole, layer, kept in zip(rows, layers, groups, strict=True):
        whole[:, kept] = layer.reparam_factors["default"].factors.B.detach()
    torch.testing.assert_close(input_angles(small)["mlp.down_proj"][0], principal_angles(*rows))
