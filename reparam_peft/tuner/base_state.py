"""PEFT's state dict of a base model, in which opened parameters have the model's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import Tensor

from ..layers.experts import fused_parameters, in_layout, is_open
from ..layers.parameters import opened_parameters
from ..runtime.hosts import extend

MODULES = (peft, peft.utils, peft.utils.save_and_load)  # each of which holds the functions


@dataclass(frozen=True)
class _Stack:
    """Tensors of the layers of an opened parameter, and the one that they are in the model.

    Attributes:
        name: of the model's own tensor.
        keys: of the layers' tensors.
        joined: makes the former of the latter, stacked.
        split: the inverse.
    """

    name: str
    keys: list[str]
    joined: Callable[[Tensor], Tensor]
    split: Callable[[Tensor], Tensor]


def register_base_state() -> None:
    """Have `get_base_model_state_dict` and `set_base_model_state_dict` of PEFT know opened parameters. Idempotent."""
    for module in MODULES:
        extend(module, "get_base_model_state_dict", _getting)
        extend(module, "set_base_model_state_dict", _setting)


def _getting(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def get(model: PeftModel) -> dict[str, Tensor]:
        state = original(model)
        for stack in _stacks(model):
            tensors = [state.pop(key) for key in stack.keys if key in state]
            if len(tensors) == len(stack.keys):  # else the weight of one is gone, as it is of linear layers
                state[stack.name] = stack.joined(torch.stack(tensors))
        return state

    return get


def _setting(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(model: PeftModel, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        state = dict(state_dict)
        for stack in _stacks(model):
            if stack.name in state:
                state |= zip(stack.keys, stack.split(state.pop(stack.name)), strict=True)
        return original(model, state, strict)

    return load


def _stacks(model: PeftModel) -> Iterator[_Stack]:
    base = model.get_base_model()
    for name, experts in fused_parameters(base).items():
        key = name.rpartition(".")[2]
        if is_open(experts, key):
            numbers = range(len(list(experts.get_submodule(key).children())))
            layout = partial(in_layout, experts)
            yield _Stack(name, [f"{name}.{i}.weight" for i in numbers], layout, layout)
            yield _Stack(f"{name}_bias", [f"{name}.{i}.bias" for i in numbers], Tensor.clone, Tensor.clone)
    for name, opened in opened_parameters(base).items():
        keys = [f"{name}.{i}.weight" for i in range(len(opened.layers))]
        yield _Stack(name, keys, partial(opened.reading.parameter, shape=opened.shape), opened.reading.matrices)
