"""Snapshots: an error leaves a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.models import net
from torch import nn
from torch.fx.immutable_collections import immutable_list

from reparam_peft.runtime.restoring import unchanged_on_error


def hooked(model: nn.Module) -> None:
    model.first.register_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module replaced": lambda m: setattr(m, "first", nn.Identity()),
    "a module added": lambda m: m.add_module("third", nn.Linear(2, 2)),
    "a weight dropped": lambda m: setattr(m.first, "weight", None),
    "other numbers": lambda m: setattr(m.first.weight, "data", torch.zeros(1)),
    "frozen": lambda m: m.requires_grad_(False),
    "another mode": lambda m: m.eval(),
    "a hook": hooked,
    "a buffer": lambda m: m.register_buffer("mask", torch.ones(1)),
    "an attribute": lambda m: setattr(m, "peft_config", {}),
    "an item of a list": lambda m: m.names.append("two"),
    "an item of a dict": lambda m: m.ranks.clear(),
}


def state(model: nn.Module) -> list[object]:
    modules = [
        (name, id(module), module.training, sorted(vars(module)), sorted(module._buffers), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    parameters = [(name, id(p), p.requires_grad, p.data_ptr(), p.shape) for name, p in model.named_parameters()]
    return [modules, parameters, list(model.names), dict(model.ranks)]


def attempt(model: nn.Module, change: Callable[[nn.Module], object], error: BaseException, *beside: object) -> None:
    with unchanged_on_error(model, beside):
        change(model)
        raise error


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_undoes_a_change_and_success_does_not(
    change: Callable[[nn.Module], object], error: type[BaseException]
) -> None:
    model = net()
    model.names, model.ranks = ["one"], {"first": 2}
    before = state(model)
    with pytest.raises(error):
        attempt(model, change, error())
    assert state(model) == before
    with unchanged_on_error(model):
        change(model)
    assert state(model) != before


def test_objects_beside_the_model_and_the_order_of_sets() -> None:
    chosen = {"q_proj", "k_proj", "v_proj"}
    config = SimpleNamespace(rank=2, names=chosen)
    order = list(chosen)
    with pytest.raises(ValueError, match="stop"):
        attempt(net(), lambda _: vars(config).update(rank=3, other=1), ValueError("stop"), config)
    assert vars(config) == {"rank": 2, "names": chosen}
    assert list(chosen) == order


def fill(model: nn.Module) -> None:
    model.names.append("x")
    model.weight.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    raise ZeroDivisionError


def test_what_was_empty_is_emptied_again_and_what_cannot_change_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.fixed, model.names = immutable_list([]), []
    with pytest.raises(ZeroDivisionError), unchanged_on_error(model):
        fill(model)
    assert model.names == []
    assert model.weight.requires_grad
    assert not model._forward_hooks
