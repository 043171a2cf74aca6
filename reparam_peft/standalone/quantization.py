"""Factors in 8 or 4 bits: the matrices of standalone models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..layers.factorized import FactorizedModule
from ..layers.schemes import SCHEMES, Scheme
from ..numerics.storage import LEAST_INPUTS
from ..runtime.modules import set_module


class Rounding(Protocol):
    """How the matrices of a factorised module are rounded together."""

    def __call__(self, name: str, module: FactorizedModule, scheme: Scheme) -> Mapping[str, dict[str, Tensor]]:
        """The tensors of some of its linear layers, by their names in it; the others are rounded to nearest."""


def quantize(model: nn.Module, scheme: str, rounding: Rounding | None = None) -> None:
    """Quantise the factors of a model in place: matrices of linear layers with rows of at least `LEAST_INPUTS` numbers.

    Args:
        model: with factorised modules.
        scheme: one of `SCHEMES`.
        rounding: of the matrices; None: each number to the nearest one.
    """
    stored = SCHEMES[scheme]
    for prefix, module in _factorized(model):
        rounded = {} if rounding is None else rounding(prefix, module, stored)
        for name, linear in linears_of(module):
            dtype = linear.weight.dtype
            tensors = rounded[name] if name in rounded else stored.quantize(linear.weight)
            set_module(module, name, stored.linear(linear, tensors, dtype))


def prepare(module: FactorizedModule, scheme: str) -> None:
    """Give factors on the meta device the tensors that a checkpoint is to fill in."""
    for _, linear in linears_of(module):
        for key, tensor in SCHEMES[scheme].empty(linear.out_features, linear.in_features).items():
            if key == "weight":
                linear.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                linear.register_buffer(key, tensor)


def finish(prefix: str, module: FactorizedModule, scheme: str, dtype: torch.dtype) -> None:
    """Make layers that compute, of those that `prepare` has made and a checkpoint has filled in.

    Raises:
        ValueError: they are not on a device.
    """
    for name, linear in linears_of(module):
        tensors = {key: getattr(linear, key).detach() for key in SCHEMES[scheme].empty(1, 1)}
        if linear.weight.is_meta:
            raise ValueError(
                f"{prefix}.{name}: quantised factors cannot be offloaded; give a `device_map` without disk or spare CPU."
            )
        for key in tensors.keys() - {"weight"}:
            delattr(linear, key)
        set_module(module, name, SCHEMES[scheme].linear(linear, tensors, dtype))


def state_dict(model: nn.Module, scheme: str) -> dict[str, Tensor]:
    """What a checkpoint holds of a model with quantised factors."""
    linears = {f"{prefix}.{name}": linear for prefix, module in _factorized(model) for name, linear in linears_of(module)}
    state = {}
    for key, value in model.state_dict().items():
        name, _, rest = key.partition(".weight")
        if name not in linears:
            state[key] = value
        elif not rest:  # what else a library adds follows from these
            state |= {f"{name}.{part}": tensor for part, tensor in SCHEMES[scheme].tensors(linears[name]).items()}
    return state


def _factorized(model: nn.Module) -> list[tuple[str, FactorizedModule]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FactorizedModule)]


def linears_of(module: FactorizedModule) -> list[tuple[str, nn.Linear]]:
    """What is quantised of a factorised module."""
    linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return [(name, linear) for name, linear in linears if linear.in_features >= LEAST_INPUTS]
