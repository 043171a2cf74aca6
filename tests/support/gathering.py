"""Statistics of some modules of a model, and whether two are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def assert_same(one: Statistics, two: Statistics, tolerance: float = 1e-6) -> None:
    assert one.inputs == two.inputs
    assert one.rows == two.rows
    assert one.gradient_rows == two.gradient_rows
    assert one.predictions == two.predictions
    for kind in ("grams", "sums", "weighted_grams", "weighted_sums", "output_grams", "energies"):
        tensors, others = getattr(one, kind), getattr(two, kind)
        assert tensors.keys() == others.keys(), kind
        for name, tensor in tensors.items():
            assert relative_error(tensor, others[name]) <= tolerance, (kind, name)
