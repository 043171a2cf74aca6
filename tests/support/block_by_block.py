"""Compression of tiny models block by block, on texts that are long enough to refine on."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from reparam_peft import Anchoring, Refinement, compress
from support.batches import text
from support.compressing import config_of

TEXT = [text([20, 9, 20, 5, 20, 20], 20, seed=seed) for seed in range(6)]
REFINE = Refinement(epochs=2, batch_size=4, learning_rate=1e-3, autocast=None)
ALL = {"target_modules": "all-linear"}
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"sequential": True},
    "residual": {"sequential": Anchoring(1.0, 1.0)},
    "refined": {"refine": REFINE},
    "both": {"sequential": True, "refine": REFINE},
}


def by_block(model: nn.Module, batches: Any = TEXT, arguments: dict[str, Any] | None = None, **options: Any) -> PeftModel:
    return compress(model, config_of(**{**ALL, **options}), batches, progress=False, **(arguments or {})).eval()
