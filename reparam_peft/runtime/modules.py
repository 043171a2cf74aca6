"""The modules of a model: found, replaced, named in errors, in eval mode, frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this block some modules of a model are others."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            set_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            set_module(model, name, module)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place of the one of this name, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the model, and none is kept for its parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder behind one; None for all others."""
    host: Any = model  # of transformers, where it has such a config
    return host.get_encoder() if getattr(getattr(host, "config", None), "is_encoder_decoder", False) else None


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at a position are for the next token: a decoder that generates, wrapped by PEFT or not."""
    host: Any = model
    base = host.get_base_model() if hasattr(host, "get_base_model") else host
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return not type(base).__name__.endswith("ForMaskedLM") and hasattr(base, "generate")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that holds data, as others may be offloaded."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: more than one for a weight that is shared."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the module's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:
        raise type(error)(f"{name}: {error}") from error
