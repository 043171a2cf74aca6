"""Opened parameters in standalone checkpoints: opened again, marked in the files, and read as their patterns say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.attention import open_attentions
from ..layers.experts import fused_parameters, is_experts, is_open, open_experts
from ..layers.parameters import OpenedParameter, Reading, open_parameter, opened_parameters, readings_of
from .contents import DAMAGED


def open_named(model: PreTrainedModel, layers: Iterable[str], parameters: Mapping[str, str]) -> None:
    """Open parameters, in place, as the model that was saved has them open.

    Args:
        model: may be the base of the model that was saved, or have another head.
        layers: names of layers, some of which may be of fused experts.
        parameters: other parameters, with their patterns.

    Raises:
        ValueError: a parameter is not there, or not as its pattern says.
    """
    named = [*layers, *parameters]
    open_attentions(model, chain.from_iterable(candidates(model, name) for name in named))
    for name, pattern in parameters.items():
        present = dict(model.named_parameters(remove_duplicate=False))
        here = next((candidate for candidate in candidates(model, name) if candidate in present), None)
        if here is None:
            raise ValueError(f"{name}: config.json says that this parameter is factorised, but there is none; {DAMAGED}.")
        try:
            open_parameter(model, here, Reading.parse(pattern))
        except ValueError as error:
            raise ValueError(f"{name}: {error} {DAMAGED[0].upper()}{DAMAGED[1:]}.") from error
    fused = fused_parameters(model)
    for parameter in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        here = next((candidate for candidate in candidates(model, parameter) if candidate in fused), None)
        key = parameter.rpartition(".")[2]
        if here is not None and not is_open(fused[here], key):
            open_experts(fused[here], key)


def candidates(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """What something of the model that was saved may be called in this one, which may be its base, or have another head."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def opened_names(model: nn.Module) -> list[str]:
    """The names of the opened parameters of a model."""
    return [f"{name}.{key}" if name else key for name, owner in model.named_modules() for key in _opened_keys(owner)]


def mark_opened(model: nn.Module) -> None:
    """Have a tensor of one element in checkpoints under the name of each opened parameter, in place.

    As for factorised layers: a program that does not know the format finds it there and fails, rather than to make up the
    parameter that it misses.
    """
    for owner in model.modules():
        if _opened_keys(owner) and not any(parameter.is_meta for parameter in owner.parameters()):
            owner.register_state_dict_post_hook(_write_marks)
            owner.register_load_state_dict_pre_hook(_drop_marks)


def expect_marks(model: PreTrainedModel) -> None:
    """Have transformers pass by what `mark_opened` has put into the files, in place."""
    patterns = {rf"(^|\.){re.escape(name)}$" for name in opened_names(model)}
    if patterns:
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def check_readings(model: nn.Module) -> None:
    """Raise `ValueError` where a model reads a parameter in another way than it was opened; where it cannot be run, nothing."""
    opened = opened_parameters(model)
    for name, reading in readings_of(model, opened).items():
        if not reading.agrees(opened[name].reading):
            raise ValueError(
                f"{name}: config.json says {opened[name].reading.pattern()!r}, and the model reads it as "
                f"{reading.pattern()!r}; {DAMAGED}."
            )


def _opened_keys(owner: nn.Module) -> list[str]:
    """Under which names a module has opened parameters."""
    holds_experts = is_experts(owner)
    return [
        key
        for key, module in owner._modules.items()
        if isinstance(module, OpenedParameter) or (holds_experts and is_open(owner, key))
    ]


def _write_marks(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in _opened_keys(owner):
        state[prefix + key] = torch.zeros(1)


def _drop_marks(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in _opened_keys(owner):
        state.pop(prefix + key, None)
