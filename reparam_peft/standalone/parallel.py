"""Tensor parallelism of transformers: its plans are of dense layers, and factorised ones are not split by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.factorized import FactorizedModule
from ..runtime.hosts import extend

NUMBER = re.compile(r"\.\d+(?=\.|$)")
DISTRIBUTE = "maybe_distribute_model"  # of models of transformers from some version on: before weights are read


def check_unsplit(
    model: nn.Module, processes: int | None, rules: Mapping[str, str] | None = None, plan_name: str = "tp_plan"
) -> None:
    """Raise `ValueError` where a plan would split layers among processes that are factorised.

    A plan takes a factorised layer for the dense one in whose place it stands. By outputs it would take all of them for the
    part of this process, by inputs it would add whole products up.

    Args:
        model: that is loaded.
        processes: among which it is split.
        rules: name of a module or parameter, with `*` for numbers → how it, and what is in it, is split; None: those of the
            model's plan.
        plan_name: of the plan, `tp_plan` or `ep_plan`.
    """
    if processes is None or processes <= 1:
        return
    plan = (getattr(model, plan_name, None) or {}) if rules is None else rules
    places = tuple(f"{name}." for name in plan)
    layers = [name for name, module in model.named_modules() if isinstance(module, FactorizedModule)]
    split = [name for name in layers if f"{re.sub(NUMBER, '.*', name)}.".startswith(places)]
    if split:
        raise ValueError(
            f"{len(split)} layers, of which the first is {split[0]}, are factorised, and the model's `{plan_name}` would split "
            f"them among {processes} processes as if they were dense, which computes something else. Load the model whole in "
            "each process, without tensor or expert parallelism (`tp_plan`, `tp_size`, `distributed_config`); or serve a "
            "self-contained checkpoint by vLLM or SGLang, which split the factors."
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
            for plan_name, size_name in (("tp_plan", "tp_size"), ("ep_plan", "ep_size")):
                given = getattr(distributed_config, plan_name, None)
                of_model = (getattr(model, plan_name, None) or {}) if given else {}  # not every version has both
                rules = {**of_model, **given} if isinstance(given, dict) else None
                check_unsplit(model, getattr(distributed_config, size_name, None), rules, plan_name)
        return original(cls, model, distributed_config, mesh_manager, *more, **named)

    return maybe_distribute_model
