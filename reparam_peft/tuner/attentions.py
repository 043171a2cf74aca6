"""Which parts of `nn.MultiheadAttention` a config takes: it is taken as a module, and computes with parameters of its own."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, BaseTuner
from torch import nn

from ..config.reparam_config import ReparamConfig
from ..layers.attention import OUTPUT, PACKED, SEPARATE, is_attention, projections_of
from ..runtime.blocks import block_of, repeated_blocks
from ..runtime.hosts import ExcludedModule

PARTS = (PACKED, *SEPARATE, f"{OUTPUT}.weight")


def parts_of_attentions(config: ReparamConfig, model: nn.Module) -> list[str]:
    """The parameters of the attentions that a config takes as modules: what projects their inputs, and the output weight."""
    names = [name for name, module in model.named_modules() if is_attention(module)]
    asked = config.target_modules
    takes_linear = isinstance(asked, str) and asked.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if asked is None and names:
        blocks = list(repeated_blocks(model))
        within = [name for name in names if block_of(name, blocks) is not None]
        names = within or names
    taken = [name for name in names if _takes(config, name, named=not (takes_linear or asked is None))]
    keys = {name: [*projections_of(model.get_submodule(name)), f"{OUTPUT}.weight"] for name in taken}
    return [f"{name}.{key}" for name in taken for key in keys[name]]


def outputs_of_attentions(config: ReparamConfig, model: nn.Module) -> list[str]:
    """The output layers of attentions that a config takes by their own names."""
    owners = [name for name, module in model.named_modules() if is_attention(module)]
    names = [f"{name}.{OUTPUT}".lstrip(".") for name in owners]
    return [name for name in names if isinstance(config.target_modules, (set, str)) and _takes(config, name)]


def is_taken_by_parts(config: ReparamConfig, name: str) -> bool:
    """Whether a module is an attention of which a config, resolved, takes parts."""
    parameters = config.target_parameters
    return not isinstance(parameters, str) and any(f"{name}.{part}" in (parameters or ()) for part in PARTS)


def _takes(config: ReparamConfig, name: str, named: bool = True) -> bool:
    """Whether `target_modules` matches a name, or where it does not say, whether nothing else in the config excludes it."""
    if not named:
        config = copy.copy(config)
        every: set[str] = {name}
        config.target_modules = every  # type: ignore[assignment]  # PEFT makes sets of lists, too
    matched = BaseTuner._check_target_module_exists(config, name)
    return bool(matched) and not isinstance(matched, ExcludedModule)
