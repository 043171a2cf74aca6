"""Checks of the arguments of `HealingTrainer`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..arguments import ReparamWarning, check_bool, is_finite, is_int
from ..tuner.layer import reparam_layers
from ..tuner.model import ReparamModel
from .trained import norms_of, routers_of

TRAINS = ("factors", "norms", "biases")  # by default
IN_FEW_BITS = (
    "all factors are stored in few bits, which do not train: compress with `form='corrected', r=...`, whose corrections do, or "
    "heal factors in the model's dtype with `quantize`, and store them in few bits by `to_standalone(quantize=...)`"
)
ROUTERS = "routers"


def checked_model(model: Any) -> PeftModel:
    """The model, which must be a `PeftModel` with one active adapter of this package.

    Raises:
        TypeError: it is not.
    """
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ReparamModel) or not isinstance(adapter, str):
        raise TypeError(
            f"`model` must be a PeftModel with an active reparam adapter, got a {type(model).__name__}; make one with "
            "`reparam_peft.compress` or `get_peft_model`."
        )
    return model


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
    student = model.get_base_model()
    words, teachers_words = _vocabulary(student), _vocabulary(teacher)
    if words is not None and teachers_words is not None and words != teachers_words:
        raise ValueError(f"`teacher` must have the vocabulary of the model, of {words}, and has one of {teachers_words}.")
    labels, teachers_labels = (getattr(getattr(m, "config", None), "num_labels", None) for m in (student, teacher))
    classify = words is None and teachers_words is None and labels is not None and teachers_labels is not None
    if classify and labels != teachers_labels:
        raise ValueError(f"`teacher` must have the {labels} labels of the model, and has {teachers_labels}.")


def _vocabulary(model: nn.Module) -> int | None:
    """How many words a model predicts; None where it predicts none."""
    output_embeddings = getattr(model, "get_output_embeddings", None)
    return getattr(output_embeddings(), "out_features", None) if callable(output_embeddings) else None


def check_loss(distillation: float, temperature: float, hidden: float, cache: Any, top_k: int, disable_dropout: Any) -> None:
    """Raise `ValueError` or `TypeError` where an argument that the loss depends on is out of its range or has no effect."""
    if disable_dropout is not None:
        check_bool("disable_dropout", disable_dropout)
    if not 0 <= distillation <= 1:
        raise ValueError(f"`distillation` must be in [0, 1], got {distillation!r}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
    if not 0 <= hidden < float("inf"):
        raise ValueError(f"`hidden` must be finite and not negative, got {hidden!r}.")
    if not is_int(top_k) or top_k < 1:
        raise ValueError(f"`top_k` must be a positive whole number, got {top_k!r}.")
    if cache is not None and (hidden or temperature != 1):
        raise ValueError("`teacher_cache` keeps probabilities at temperature 1 only; leave out `hidden` and `temperature`.")


def check_classes(model: PeftModel, distillation: float) -> None:
    """Raise `ValueError` where the model's outputs are no classes, whose probabilities a student could imitate."""
    config = getattr(model.get_base_model(), "config", None)
    problem = getattr(config, "problem_type", None)
    if distillation and problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"`distillation` compares distributions over classes, and `problem_type` of the model is {problem!r}; use "
            "`distillation=0`, with `hidden` for the teacher's part."
        )


def check_trained(model: PeftModel, trains: Sequence[str]) -> None:
    """Raise `ValueError` unless what is to be trained is known, and something that the model has."""
    known = (*TRAINS, ROUTERS)
    unknown = [trains] if isinstance(trains, str) else [part for part in trains if part not in known]
    if unknown:
        raise ValueError(f"`trains` must be a list of {', '.join(known)}, got {unknown[0]!r}.")
    if ROUTERS in trains and not routers_of(model):
        raise ValueError(f"`trains` names {ROUTERS!r}, and the model has no routers of experts; leave them out.")
    adapter = model.active_adapter
    saved_whole = any(isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save for m in model.modules())
    stored = {name == "bias" for _, layer in reparam_layers(model) for name, _ in layer.factorized(adapter).named_parameters()}
    has = {"factors": False in stored, "biases": True in stored, "norms": bool(norms_of(model)), ROUTERS: True}
    coded = any(layer.factorized(adapter).coded for _, layer in reparam_layers(model))
    if "factors" in trains and coded and not has["factors"]:
        others = [part for part in trains if has[part]] + ["modules_to_save"] * saved_whole
        if not others:
            raise ValueError(f"`trains` names nothing that can be trained: {IN_FEW_BITS}.")
        warnings.warn(f"Only {', '.join(others)} are trained: {IN_FEW_BITS}.", ReparamWarning, stacklevel=4)
    if not (saved_whole or any(has[part] for part in trains)):
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


def check_minutes(minutes: Any, args: Any, trainer_args: Sequence[Any], trainer_kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` where a time is none, or where `args` say otherwise how long the training is."""
    if minutes is None:
        return
    if not is_finite(minutes) or minutes <= 0:
        raise ValueError(f"`minutes` must be a positive number or None, got {minutes!r}.")
    bound = inspect.signature(Trainer.__init__).bind_partial(None, None, args, *trainer_args, **trainer_kwargs).arguments
    if any(part is not None for part in (bound.get("optimizers") or (None, None))[1:]):
        raise ValueError("`minutes` needs a schedule that follows the time; leave the scheduler out of `optimizers`.")
    if args is None:
        return
    if args.max_steps > 0 or args.num_train_epochs != TrainingArguments.num_train_epochs:
        raise ValueError("`minutes` say how long the training is; leave out `max_steps` and `num_train_epochs`, or `minutes`.")
    if args.warmup_steps >= 1:
        raise ValueError(
            f"`warmup_steps` must be a fraction of the time, below 1, where `minutes` are given, got {args.warmup_steps}."
        )
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        name = args.lr_scheduler_type.value
        raise ValueError(
            f"`lr_scheduler_type` {name!r} follows the loss; take one that follows the time, or leave out `minutes`."
        )
