"""Adapters of tiny models that are made without data."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from reparam_peft import ReparamConfig


def compress(model: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(model, ReparamConfig(**options))
