"""Checks of the arguments of `HealingTrainer`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer

from ..tuner.layer import reparam_layers
from ..tuner.model import ReparamModel
from .trained import norms_of

TRAINS = ("factors", "norms", "biases")


def check_model(model: Any) -> None:
    """Raise `TypeError` unless a model is a `PeftModel` with one active adapter of ours."""
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ReparamModel) or not isinstance(adapter, str):
        raise TypeError(
            f"`model` must be a PeftModel with an active reparam adapter, got a {type(model).__name__}; make one with "
            "`reparam_peft.compress` or `get_peft_model`."
        )


def check_teacher(model: PeftModel, teacher: Any) -> None:
    """Raise `ValueError` or `TypeError` unless there is a teacher: the one given, or the base that the adapter has kept."""
    if teacher is None:
        if any(layer.base_weight_dropped for _, layer in reparam_layers(model)):
            raise ValueError(
                "there is no teacher: the original weights were dropped. Give the dense model as `teacher`, or compress with "
                "`keep_base=True`."
            )
        return
    if not isinstance(teacher, nn.Module) or teacher is model:
        raise TypeError(f"`teacher` must be another model, got a {type(teacher).__name__}.")
    ours, theirs = (getattr(m.get_output_embeddings(), "out_features", None) if hasattr(m, "get_output_embeddings") else None
                    for m in (model.get_base_model(), teacher))  # fmt: skip
    labels = [getattr(getattr(m, "config", None), "num_labels", None) for m in (model.get_base_model(), teacher)]
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(f"`teacher` must have the vocabulary of the model, of {ours}, and has one of {theirs}.")
    if (ours, theirs) == (None, None) and None not in labels and labels[0] != labels[1]:
        raise ValueError(f"`teacher` must have the {labels[0]} labels of the model, and has {labels[1]}.")


def check_loss(distillation: float, temperature: float, hidden: float, cache: Any, top_k: int) -> None:
    """Raise `ValueError` where an argument that weighs the loss is out of its range or has no effect."""
    if not 0 <= distillation <= 1:
        raise ValueError(f"`distillation` must be in [0, 1], got {distillation!r}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
    if not 0 <= hidden < float("inf"):
        raise ValueError(f"`hidden` must be finite and not negative, got {hidden!r}.")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`top_k` must be a positive whole number, got {top_k!r}.")
    if cache is not None and (hidden or temperature != 1):
        raise ValueError("`teacher_cache` keeps probabilities at temperature 1 only; leave out `hidden` and `temperature`.")


def check_classes(model: PeftModel, distillation: float) -> None:
    """Raise `ValueError` where the model's outputs are no classes, whose probabilities a student could imitate."""
    config = getattr(model.get_base_model(), "config", None)
    kind = getattr(config, "problem_type", None)
    if distillation and kind in ("regression", "multi_label_classification"):
        raise ValueError(
            f"`distillation` compares distributions over classes, and `problem_type` of the model is {kind!r}; use "
            "`distillation=0`, with `hidden` for the teacher's part."
        )


def check_trained(model: PeftModel, trains: Sequence[str]) -> None:
    """Raise `ValueError` unless what is to be trained is known, and something that the model has."""
    unknown = [kind for kind in trains if kind not in TRAINS] if not isinstance(trains, str) else [trains]
    if unknown:
        raise ValueError(f"`trains` must be a list of {', '.join(TRAINS)}, got {unknown[0]!r}.")
    adapter = model.active_adapter
    whole = any(isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save for m in model.modules())
    biases = any(layer.reparam_factors[adapter].bias is not None for _, layer in reparam_layers(model))
    if not (whole or "factors" in trains or ("norms" in trains and norms_of(model)) or ("biases" in trains and biases)):
        raise ValueError(f"`trains` must name something that the model has, got {list(trains)!r}; add 'factors'.")


def check_arguments(
    args: Any, trainer_args: Sequence[Any], trainer_kwargs: Mapping[str, Any], distillation: float, lora: Any
) -> None:
    """Raise where arguments of `Trainer` would have no effect here, or a wrong one."""
    bound = inspect.signature(Trainer.__init__).bind_partial(None, None, args, *trainer_args, **trainer_kwargs).arguments
    smoothing = getattr(args, "label_smoothing_factor", 0)
    if distillation == 1 and (bound.get("compute_loss_func") is not None or smoothing):
        raise ValueError(
            "`compute_loss_func` and `label_smoothing_factor` are of the task's own loss, which has no part in "
            "`distillation=1`; lower it, or leave them out."
        )
    if lora is not None and any(part is not None for part in bound.get("optimizers") or ()):
        raise ValueError("`optimizers` cannot hold what `lora` adds when training begins; set `args.optim`.")
    if lora is not None and getattr(args, "fsdp", None):
        raise ValueError("`lora` cannot be merged into sharded factors; train the factors themselves, or leave out `fsdp`.")
