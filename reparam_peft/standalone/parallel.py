"""Tensor parallelism of transformers: its plans are of dense layers, and factorised ones are not split by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.factorized import FactorizedModule
from ..runtime.hosts import extend

DISTRIBUTE = "maybe_distribute_model"  # of models of transformers from some version on: before weights are read


def check_unsplit(model: nn.Module, processes: int | None, rules: Mapping[str, str] | None = None) -> None:
    """Raise `ValueError` where a plan would split layers among processes that are factorised.

    A plan takes a factorised layer for the dense one in whose place it stands. By outputs it would take all of them for the
    part of this process, by inputs it would add whole products up.

    Args:
        model: that is loaded.
        processes: among which it is split.
        rules: name of a module, with `*` for numbers → how it is split; None: those of the model's plan.
    """
    if processes is None or processes <= 1:
        return
    plan = (getattr(model, "tp_plan", None) or {}) if rules is None else rules
    layers = [name for name, module in model.named_modules() if isinstance(module, FactorizedModule)]
    split = [name for name in layers if re.sub(r"\.\d+(?=\.|$)", ".*", name) in plan]
    if split:
        raise ValueError(
            f"{split[0]}: this layer and {len(split) - 1} others are factorised, and the model's `tp_plan` would split them "
            f"among {processes} processes as if they were dense, which computes something else. Load the model whole in each "
            "process, without `tp_plan`, `tp_size` and tensor parallelism in `distributed_config`; or serve a self-contained "
            "checkpoint by vLLM or SGLang, which split the factors."
        )


def register_parallel() -> None:
    """Have transformers refuse to split factorised layers before it reads weights, where its version says so. Idempotent."""
    owner = next((owner for owner in PreTrainedModel.__mro__ if DISTRIBUTE in vars(owner)), None)
    if owner is not None:
        extend(owner, DISTRIBUTE, _distributing)


def _distributing(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_distribute_model(
        cls: Any, model: Any, distributed_config: Any, mesh_manager: Any, *more: Any, **named: Any
    ) -> Any:
        if mesh_manager is not None:
            given = getattr(distributed_config, "tp_plan", None)
            rules = {**(model.tp_plan if given else {}), **given} if isinstance(given, dict) else None
            check_unsplit(model, distributed_config.tp_size, rules)
        return original(cls, model, distributed_config, mesh_manager, *more, **named)

    return maybe_distribute_model
