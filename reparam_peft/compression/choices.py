"""What `compress` and `plan` choose where a config leaves it open."""

from __future__ import annotations

import copy
from typing import Any

from ..config.reparam_config import ReparamConfig
from ..defaults import CALIBRATED
from ..numerics.methods import method_of
from ..numerics.storage import WIDTHS
from ..planning.plan import Plan


def with_defaults(config: ReparamConfig, plan: Plan | None = None, moves_bias: bool = False) -> ReparamConfig:
    """A copy with the choices of a plan, or of `compress`, where the config makes none; checked as one."""
    config = copy.deepcopy(config)
    if config.stored_parameters is not None:
        raise ValueError("`config` is that of a compressed model (its sizes are filled in); make a new one.")
    for name in ("form_pattern", "bit_pattern", "correction_bits"):
        if getattr(config, name):
            raise ValueError(f"`{name}` is filled in by the model; leave it out, and say what is allowed by `form` and `bits`.")
    choices: dict[str, Any] = {**CALIBRATED, **({"allocation": "uniform"} if config.r is not None else {})}
    if plan is not None:
        _check_few_bits(config, plan)
        choices = {"method": plan.method, "allocation": plan.allocation, "form": plan.form}
        choices |= {"r": plan.correction_rank} if plan.budget == "parameters" else {"budget": plan.budget}
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


def _check_few_bits(config: ReparamConfig, plan: Plan) -> None:
    """Raise `ValueError` where a plan has forms or widths that a config, before it has the plan's choices, does not allow."""
    widths = {*plan.bits.values()} - {*(config.bits or WIDTHS)}
    if widths:
        raise ValueError(f"`plan` has numbers in {min(widths)} bits, and the config says `bits={config.bits!r}`; leave it out.")
    forms = {*plan.forms.values()} - {config.form, "dense"} if config.form is not None else set[str]()
    if forms:
        raise ValueError(f"`plan` has matrices in the form {min(forms)!r}, and the config says {config.form!r}; leave it out.")
