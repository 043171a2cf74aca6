"""What a model holds, and whether it is that of another or as it was."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from support.tolerances import relative_error


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        ],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "versions": [parameter._version for parameter in model.parameters()],
    }


def assert_same_model(one: PeftModel, two: PeftModel, tolerance: float = 0.0) -> None:
    a, b = one.peft_config["default"], two.peft_config["default"]
    assert (a.rank_pattern, a.dense_modules, a.stored_parameters) == (b.rank_pattern, b.dense_modules, b.stored_parameters)
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.is_floating_point():
            assert relative_error(tensor, second[name]) <= tolerance, name
        else:
            assert torch.equal(tensor, second[name]), name


def assert_untouched(model: nn.Module, reference: nn.Module) -> None:
    """Same modules, same tensors, same `requires_grad` as a fresh copy."""
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    got, expected = dict(model.named_parameters()), dict(reference.named_parameters())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].nan_to_num(7), value.nan_to_num(7)), name
        assert got[name].requires_grad == value.requires_grad, name
