"""Healing of tiny models: rows to train on, what is trained, and a trainer of few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from reparam_peft import HealingTrainer, ReparamConfig
from support.batches import text
from support.models import llama

LENGTH = 16
BERT = {"target_modules": ["query", "key", "value"]}
ROWS = [{k: v[0] for k, v in text([LENGTH], LENGTH, seed=seed).items()} for seed in range(24)]


class Time:
    """A clock that moves on by as much at each look."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 100.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def small(build: Callable[[], nn.Module] = llama, **options: Any) -> PeftModel:
    return get_peft_model(build(), ReparamConfig(**{"target_modules": "all-linear", "keep": 0.4, **options}))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    plain = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**plain, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, **options})


def trainer(folder: Path, model: Any = None, rows: Any = ROWS, **options: Any) -> HealingTrainer:
    own = {
        "teacher",
        "distillation",
        "temperature",
        "hidden",
        "trains",
        "lora",
        "teacher_cache",
        "top_k",
        "disable_dropout",
        "minutes",
        "quantize",
        "statistics",
        "eval_dataset",
    }
    own |= {"compute_loss_func", "data_collator", "optimizers"}
    ours = {key: options.pop(key) for key in own & options.keys()}
    if model is None:
        model = small()
    if "teacher" not in ours:
        ours["teacher"] = llama()
    return HealingTrainer(model, arguments(folder, **options), train_dataset=rows, **ours)


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def falls(made: Trainer) -> bool:
    """Whether the loss of the last third is below that of the first, batches being few and different."""
    found = losses(made)
    third = len(found) // 3
    return sum(found[-third:]) < 0.97 * sum(found[:third])


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def padded(lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [{k: v[0] for k, v in text([n], LENGTH, seed=n).items()} for n in lengths]
