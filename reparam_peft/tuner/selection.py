"""Which modules of a model a config takes, before anything is changed."""

from __future__ import annotations

import copy
from functools import partial
from typing import cast

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import nn

from ..config.reparam_config import ReparamConfig
from .model import ReparamModel
from .reach import takes_what_there_is, warn_of_reach
from .targets import Target, check_targets, find_targets, is_target, save_heads


def select_targets(model: nn.Module, config: ReparamConfig, adapter_name: str, loading: bool = False) -> dict[str, Target]:
    """The targets that `get_peft_model` would take for a config, checked; changes neither model nor config.

    With `loading`, weights may be on the meta device.

    Raises:
        TypeError, ValueError: as for `get_peft_model`.
    """
    config = copy.deepcopy(config)
    takes_all = takes_what_there_is(config)
    save_heads(config)
    tuner = ReparamModel.__new__(ReparamModel)
    prepared = tuner._prepare_adapter_config(config, BaseTuner.get_model_config(model))
    config = cast(ReparamConfig, _maybe_include_all_linear_layers(prepared, model))  # each returns what it was given
    targets = find_targets(config, model, partial(is_target, config))
    if not targets:
        raise ValueError(f"`target_modules` {config.target_modules!r} match no module of the model; check the names.")
    check_targets(targets, config, model, adapter_name, loading)
    warn_of_reach(model, targets, config, takes_all)
    return targets
