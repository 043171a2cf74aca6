"""Which modules of a model a config takes, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

from peft.tuners.tuners_utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, BaseTuner
from torch import nn
from transformers import PreTrainedModel

from ..config.reparam_config import ReparamConfig
from ..runtime.blocks import block_of, repeated_blocks
from ..runtime.hosts import include_all_linear_layers
from .opening import open_parameters
from .reach import warn_of_reach
from .target_modules import TARGET_MODULES
from .targets import Target, check_targets, find_targets, is_target, save_heads
from .tying import take_tables


def select_targets(model: nn.Module, config: ReparamConfig, adapter_name: str, loading: bool = False) -> dict[str, Target]:
    """The targets that `get_peft_model` would take for a config, checked.

    Opens the fused parameters that the config takes; else it changes neither model nor config.

    With `loading`, weights may be on the meta device.

    Raises:
        TypeError, ValueError: as for `get_peft_model`.
    """
    config = copy.deepcopy(config)
    takes_all = not names_targets(config)
    save_heads(config)
    targets = take_targets(config, model, partial(is_target, config), opens=not loading)
    if not targets:
        raise ValueError(f"`target_modules` {config.target_modules!r} match no module of the model; check the names.")
    check_targets(targets, config, model, adapter_name, loading)
    warn_of_reach(model, targets, config, takes_all)
    return targets


def names_targets(config: ReparamConfig) -> bool:
    """Whether a config names its targets, so that each of them is wanted."""
    given = config.target_modules
    return given is not None and not (isinstance(given, str) and given.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND)


def with_targets(config: ReparamConfig, targets: Iterable[str]) -> ReparamConfig:
    """A copy of a config that takes these targets, of those that it had selected, and no others."""
    config = copy.deepcopy(config)
    names = {*targets}
    config.choose(names, None if names_targets(config) else names)
    return config


def take_targets(
    config: ReparamConfig, model: nn.Module, matches: Callable[[str], object], opens: bool = True
) -> dict[str, Target]:
    """The targets of a config, which then names them: changes it in place, and opens the fused parameters that it takes.

    Where the config leaves them open, modules that cannot be factorised are left out, with one warning.

    Args:
        config: whose `target_modules` may be "all-linear"; None: the projections of the known architectures, of others all
            linear layers of the repeated blocks.
        model: whose modules they are.
        matches: whether a name is one of a target, by the config.
        opens: whether attentions may be opened, too.

    Raises:
        TypeError, ValueError: as for `find_targets`; or no default is known for the model.
    """
    open_parameters(config, model, opens)
    if names_targets(config):
        take_tables(config, model)
    if names_targets(config) or not _has_default(config, model):
        return find_targets(config, model, matches)
    if config.target_modules is None:
        _take_default(config, model)
    else:
        linear = _all_linear(config, model)
        _choose(config, model, linear, linear)
    targets = find_targets(config, model, matches, named=False)
    config.choose(targets)
    return targets


def _has_default(config: ReparamConfig, model: nn.Module) -> bool:
    """Whether modules are taken that a config leaves open: not beside parameters in an unknown architecture, as for LoRA."""
    known = BaseTuner.get_model_config(model).get("model_type") in TARGET_MODULES
    return known or not config.takes_parameters_alone()


def _choose(config: ReparamConfig, model: nn.Module, names: Iterable[str], target_modules: Iterable[str] | None = None) -> None:
    """Take these modules and those of opened parameters, in place."""
    opened = (name for name, _ in model.named_modules() if config.is_of_parameters(name))
    config.choose([*names, *opened], target_modules)


def _take_default(config: ReparamConfig, model: nn.Module) -> None:
    """Endings of the names of the default targets, in place."""
    model_type = BaseTuner.get_model_config(model).get("model_type")
    if model_type in TARGET_MODULES:
        config.choose((name for name, _ in model.named_modules()), TARGET_MODULES[model_type])
        return
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: no default is known for a {type(model).__name__}, which is no "
            'model of transformers. "all-linear" takes every linear layer.'
        )
    blocks = list(repeated_blocks(model))
    linear = _all_linear(config, model)
    within = {name: block for name in linear if (block := block_of(name, blocks)) is not None}
    if within:
        _choose(config, model, within, (name.removeprefix(f"{block}.") for name, block in within.items()))
    else:
        _choose(config, model, linear, linear)


def _all_linear(config: ReparamConfig, model: nn.Module) -> set[str]:
    """The names of what PEFT takes for all linear layers of a model, but for those of opened parameters."""
    config = copy.copy(config)
    config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
    include_all_linear_layers(config, model)  # in place
    linear = {name for name in config.target_modules or () if not config.is_of_parameters(name)}
    if not linear and not config.target_parameters:
        raise ValueError(
            f"a {type(model).__name__} has no linear layers, which are taken where none are named. Give `target_modules` the "
            "endings of names of others, such as convolutions."
        )
    return linear
