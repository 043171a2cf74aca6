"""Calibrated compression of tiny models, in one shot."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from reparam_peft import Plan, ReparamConfig, Statistics, compress, plan
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.tuner.layer import ReparamLayer
from support.batches import Batch, images, text
from support.models import Case

TEXT = [text([12, 9, 12, 5], 12), text([10, 10, 3, 7], 10, seed=1)]
IMAGES = [images(3, (3, 10, 9), "x"), images(2, (3, 10, 9), "x", seed=1)]


def batches_of(case: Case) -> list[Batch]:
    return IMAGES if case.kind == "Conv2d" else TEXT


def config_of(**options: Any) -> ReparamConfig:
    """Small matrices need small steps of rank."""
    chosen = options.get("allocation") != "uniform" and "r" not in options
    return ReparamConfig(**{"keep": 0.5, **({"rank_multiple": 2} if chosen else {}), **options})


def compressed(
    model: nn.Module, batches: Any, *, seed: int = 0, arguments: dict[str, Any] | None = None, **options: Any
) -> PeftModel:
    return compress(model, config_of(**options), batches, seed=seed, progress=False, **(arguments or {})).eval()


def planned(model: nn.Module, batches: Any, *, arguments: dict[str, Any] | None = None, **options: Any) -> Plan:
    return plan(model, config_of(**options), batches, progress=False, **(arguments or {}))


def layers(model: nn.Module) -> dict[str, ReparamLayer]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, ReparamLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def output_errors(small: PeftModel, statistics: Statistics, original: nn.Module) -> dict[str, float]:
    """E|W x − A B x|² of each module on the calibration data, of the centred rows where there is a bias."""
    errors = {}
    for name, layer in layers(small).items():
        module = original.get_submodule(name)
        W = layer_kind(module).matrix(module.weight.detach()).double()
        D = W - layer.dense_matrix("default").double()
        G = statistics.covariance(name) if getattr(module, "bias", None) is not None else statistics.gram(name)
        errors[name] = float(((D * G if G.ndim == 1 else D @ G) * D).sum())
    return errors


def scale_of(model: nn.Module, name: str, statistics: Statistics) -> float:
    """E|W x|² of a module on the calibration data."""
    module = model.get_submodule(name)
    W, G = layer_kind(module).matrix(module.weight.detach()).double(), statistics.gram(name)
    return float(((W * G if G.ndim == 1 else W @ G) * W).sum())


ROWS = [{"x": torch.randn(40, 20, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
Q = {"target_modules": ["q_proj"]}
ALL = {"target_modules": "all-linear"}
