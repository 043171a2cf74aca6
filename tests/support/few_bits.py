"""Configs of tiny models with matrices in each form, and numbers in 8 and 4 bits and in the dtype of the model."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from reparam_peft import ReparamConfig

FEW_BITS = "each form, in few bits"  # in place of a form


def config_in_few_bits(model: nn.Module, **options: Any) -> ReparamConfig:
    """All linear layers of a model's blocks, data-free; one of them, as factors, in the dtype of the model."""
    shapes = {name: m.weight.shape for name, m in model.named_modules() if type(m) is nn.Linear and "layers" in name}
    forms = dict(zip(shapes, itertools.cycle(["factors", "pivot", "dense", "corrected"]), strict=False))
    bits = dict(zip(shapes, itertools.cycle([8, 4, 4, 4, 4, 8, 8, 8]), strict=False))
    del bits[next(name for name in reversed(forms) if forms[name] == "factors")]
    ranks = {name: min(shape) if forms[name] == "dense" else min(17, *shape) for name, shape in shapes.items()}
    patterns = {"rank_pattern": ranks, "form_pattern": forms, "bit_pattern": bits}
    return ReparamConfig(target_modules="all-linear", **patterns, **options)
