"""Calls of small modules: by `forward` alone only where nobody would notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from reparam_peft.layers.calling import call
from reparam_peft.standalone.modeling_reparam import call as call_in_reader

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda module, see: module.register_forward_hook(see),
    "before": lambda module, see: module.register_forward_pre_hook(see),
    "backward": lambda module, see: module.register_full_backward_hook(see),
    "before backward": lambda module, see: module.register_full_backward_pre_hook(see),
    "forward of all modules": lambda module, see: register_module_forward_hook(see),
    "before all modules": lambda module, see: register_module_forward_pre_hook(see),
    "backward of all modules": lambda module, see: register_module_full_backward_hook(see),
    "before backward of all modules": lambda module, see: register_module_full_backward_pre_hook(see),
}


CALLS = {"layers": call, "self-contained": call_in_reader}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("of", CALLS)
def test_hooks_see_the_call(of: str, kind: str) -> None:
    layer, seen = nn.Linear(3, 2), []
    x = torch.randn(4, 3, requires_grad=True)
    expected = layer(x)
    handle = HOOKS[kind](layer, lambda module, *args: seen.append(module))
    try:
        y = CALLS[of](layer, x)
        y.sum().backward()
    finally:
        handle.remove()
    assert torch.equal(y, expected)
    assert seen == [layer]


@pytest.mark.parametrize("of", CALLS)
def test_a_forward_of_its_own_or_a_compiled_one_is_what_runs(of: str) -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    plain, replaced, compiled = Doubling(), Doubling(), Doubling()
    replaced.forward = lambda x: 3 * x  # as accelerate does where weights are offloaded
    compiled._compiled_call_impl = lambda x: 4 * x
    assert [float(CALLS[of](module, torch.ones(()))) for module in (plain, replaced, compiled)] == [2, 3, 4]
