"""Parameters that are no layer's weight, such as fused experts: which a config takes, opened into layers, closed again."""

from __future__ import annotations

import re

from torch import nn

from ..arguments import listed
from ..config.fields import ALL_EXPERTS
from ..config.reparam_config import ReparamConfig
from ..layers.experts import READERS, WRITER, ExpertLinear, close_experts, fused_parameters, is_experts, is_open, open_experts
from ..runtime.modules import is_offloaded, naming

MOST_NAMED = 6  # in a message


def named_parameters(config: ReparamConfig, model: nn.Module) -> list[str]:
    """The names of those parameters of a model, fused experts or weights of layers, that `target_parameters` takes.

    Raises:
        ValueError: it matches none, or one of its names does; or accelerate moves the parameters in each pass.
    """
    asked = config.target_parameters
    if not asked:
        return []
    fused = fused_parameters(model)
    if asked == ALL_EXPERTS:
        if not fused:
            raise ValueError(
                f"`target_parameters={ALL_EXPERTS!r}`, and the model has no fused experts that can be opened; leave it out."
            )
        taken = list(fused)
    else:
        names = [name for name, _ in model.named_parameters() if name not in fused] + list(fused)
        patterns = [asked] if isinstance(asked, str) else list(asked)
        by_pattern = {
            pattern: [name for name in names if _takes(pattern, name, isinstance(asked, str))] for pattern in patterns
        }
        unused = sorted(pattern for pattern, matched in by_pattern.items() if not matched)
        taken = list(dict.fromkeys(name for matched in by_pattern.values() for name in matched))
        if unused and not (taken or config.target_modules):
            raise ValueError(
                f"`target_parameters` {unused} match no parameter of the model; its fused experts are "
                f"{listed(list(fused)[:MOST_NAMED]) or 'none'}."
            )
    for name in taken:
        owner = fused.get(name)
        with naming(name):
            if owner is None and not name.endswith(".weight"):
                raise ValueError(
                    "it is neither the weight of a layer nor a parameter of fused experts; leave it out of `target_parameters`."
                )
            if owner is not None and is_offloaded(owner):
                raise ValueError(
                    "accelerate moves the experts to where they compute at each pass (they are offloaded), and could not move "
                    "opened ones. Load the model without offloading."
                )
    return taken


def open_parameters(config: ReparamConfig, model: nn.Module) -> None:
    """Open the fused parameters that a config takes, in place, and write the names of all that it takes into the config."""
    taken = named_parameters(config, model)
    if not taken:
        return
    owners = fused_parameters(model)
    for name in taken:
        key = name.rpartition(".")[2]
        if name in owners and not is_open(owners[name], key):
            open_experts(owners[name], key)
    config.target_parameters = taken


def close_parameters(model: nn.Module) -> None:
    """Close all opened parameters whose layers are linear ones again, in place."""
    for experts in model.modules():
        if is_experts(experts):
            for key in (*READERS, WRITER):
                if is_open(experts, key) and all(isinstance(m, ExpertLinear) for m in experts.get_submodule(key).children()):
                    close_experts(experts, key)


def _takes(pattern: str, name: str, is_regex: bool) -> bool:
    """Whether an ending of a name, or a regular expression for the whole of it, takes a parameter; as for modules in PEFT."""
    return bool(re.fullmatch(pattern, name)) if is_regex else name == pattern or name.endswith(f".{pattern}")
