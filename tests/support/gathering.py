"""Statistics of some modules of a model, and whether two are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from reparam_peft import Statistics
from reparam_peft.calibration.gather import gather_statistics
from support.tolerances import relative_error


def linear_layers(model: nn.Module, *leave_out: str) -> dict[str, nn.Module]:
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith(leave_out or ("lm_head",))}


def named(*names: str) -> Callable[[nn.Module], dict[str, nn.Module]]:
    return lambda model: {name: model.get_submodule(name) for name in names}


def gather(model: nn.Module, modules: Any, batches: Any, **options: Any) -> Statistics:
    return gather_statistics(model, modules(model) if callable(modules) else modules, batches, progress=False, **options)


def sums_of(statistics: Statistics) -> dict[tuple[str, str], Any]:
    """All sums, tensors and numbers, by the name of the record and of the field."""
    records = [(f"{part} {n}", r) for part in ("inputs", "outputs") for n, r in getattr(statistics, part).items()]
    nested = [(f"{name}, weighted", r.weighted) for name, r in records if getattr(r, "weighted", None) is not None]
    fields = [(name, key, value) for name, r in [*records, *nested] for key, value in vars(r).items()]
    numbers = {(name, key): value for name, key, value in fields if isinstance(value, int | float)}
    return {**numbers, **{(name, key): tensor for name, record in records for key, tensor in record.tensors()}}


def assert_same(one: Statistics, two: Statistics, tolerance: float = 1e-6) -> None:
    assert one.reads == two.reads
    sums, others = sums_of(one), sums_of(two)
    assert sums.keys() == others.keys()
    for key, value in sums.items():
        if isinstance(value, int):
            assert value == others[key], key
        elif isinstance(value, float):
            assert value == pytest.approx(others[key], rel=tolerance, abs=0), key
        else:
            assert relative_error(value, others[key]) <= tolerance, key
