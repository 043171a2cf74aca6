"""The choices that a config leaves open: those of a plan, or of `compress`."""

from __future__ import annotations

import copy
from typing import Any

from ..config.reparam_config import ReparamConfig
from ..defaults import CALIBRATED
from ..numerics.methods import method_of
from ..planning.plan import Plan


def with_defaults(config: ReparamConfig, plan: Plan | None = None, moves_bias: bool = False) -> ReparamConfig:
    """A copy with the choices of a plan, or of `compress`, where the config makes none; checked as one."""
    config = copy.deepcopy(config)
    if config.stored_parameters is not None:
        raise ValueError("`config` is that of a compressed model (its sizes are filled in); make a new one.")
    choices: dict[str, Any] = {**CALIBRATED, **({"allocation": "uniform"} if config.r is not None else {})}
    if plan is not None:
        choices = {"method": plan.method, "allocation": plan.allocation, "form": plan.form}
        choices |= {"budget": "bytes"} if plan.budget == "bytes" else {"r": plan.correction_rank}
        if config.keep == ReparamConfig.keep:
            config.keep = plan.keep
        if config.ceiling is None and config.r is None and config.allocation in (None, plan.allocation):
            config.ceiling = plan.ceiling
    for name, value in choices.items():
        setattr(config, name, getattr(config, name) or value)
    config.__post_init__()
    config.moved_bias = moves_bias or method_of(config.method).needs_data
    if config.chooses_bits:
        config.neurons = False
    return config
