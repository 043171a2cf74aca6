"""Standalone models and their checkpoints, and a reader that knows transformers alone."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from reparam_peft import ReparamConfig
from support.few_bits import FEW_BITS, config_in_few_bits
from support.models import llama
from support.narrow import narrowed

IDS = torch.arange(3, 19).reshape(2, 8)
NARROW = "fewer neurons"  # in place of a form: both of them, and matrices that are stored as they are
STOCK = """
import sys
import transformers
assert "reparam_peft" not in sys.modules
getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2])
"""


def small(form: str = "factors", model: PreTrainedModel | None = None, **options: object) -> PeftModel:
    if form == NARROW:
        return narrowed(llama() if model is None else model, **options)
    if form == FEW_BITS:
        return get_peft_model(made := llama() if model is None else model, config_in_few_bits(made, **options)).eval()
    config = ReparamConfig(**{"target_modules": "all-linear", "keep": 0.6, "form": form, **options})
    return get_peft_model(llama() if model is None else model, config).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def saved(folder: Path, form: str = "factors", **options: object) -> Path:
    small(form, **options).to_standalone().save_pretrained(folder)
    return folder
