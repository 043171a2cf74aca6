"""Training a compressed block to compute what the original block computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import check_count, check_seed
from ..defaults import EPOCHS
from ..runtime.devices import computes_bfloat16
from .blocks import Call, main_tensor

AUTOCAST = ("bfloat16", "float16")
LEAST_SIZE = 1e-3  # as of Adafactor, arXiv:1804.04235


@dataclass(frozen=True)
class Refinement:
    """How blocks are refined: AdamW with warm-up and cosine decay.

    Attributes:
        epochs: passes over the training batches, at most.
        batch_size: rows (sequences) in a step; larger batches are split. Many small steps fit better than few large ones.
        learning_rate: its peak, relative to the root mean square of each parameter at the start, so that one value suits models
            of any scale: 5e-4 is 1e-4 for weights of 0.2.
        warmup: fraction of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        max_grad_norm: to which gradients are clipped.
        holdout: fraction of the batches, the last ones, that are not trained on: they choose the epoch whose parameters are
            taken, and whether any are.
        patience: epochs without improvement there after which training stops; None: never. The error often rises at the peak
            of the learning rate, and falls below where it began as that decays.
        autocast: "bfloat16", "float16", or None: the dtype of matrix products in training. Parameters are trained in float32.
            On processors that emulate bfloat16, which takes some twenty times as long, products are in float32, too.
        seed: of the order of batches.
    """

    epochs: int = EPOCHS
    batch_size: int = 1
    learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    holdout: float = 0.125
    patience: int | None = None
    autocast: str | None = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        check_seed("seed", self.seed)
        if self.patience is not None:
            check_count("patience", self.patience)
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)!r}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"`weight_decay` must be finite and not negative, got {self.weight_decay!r}.")
        for name in ("warmup", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)!r}.")
        if self.autocast not in (None, *AUTOCAST):
            raise ValueError(f"`autocast` must be one of {AUTOCAST} or None, got {self.autocast!r}.")

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """Numbers of the batches to train on, and of those held out: at least one of each, where there are two."""
        held = min(count - 1, max(1, round(self.holdout * count))) if self.holdout and count > 1 else 0
        return list(range(count - held)), list(range(count - held, count))


@dataclass(frozen=True)
class Task:
    """What a block is to reproduce.

    Attributes:
        call: number of a batch → what the block is called with, positional and keyword arguments.
        target: number of a batch → what the first tensor of its output should be.
        mask: number of a batch and an output → which positions of it are no padding, bool, flattened; None: all.
    """

    call: Callable[[int], Call]
    target: Callable[[int], Tensor]
    mask: Callable[[int, Tensor], Tensor | None]

    def loss(self, block: nn.Module, batch: int, precision: torch.dtype | None = None) -> Tensor | None:
        """Mean of log(1 + |error|² / |target|²) over tokens (or images), a scalar in float32 or wider.

        Relative to the target, so that the few tokens of huge norm do not drown the others; the logarithm, so that neither do
        those that are huge in the compressed model only.

        Args:
            block: the original, or what takes its place.
            batch: number of the batch.
            precision: dtype that floating-point arguments of the block are cast to; None: they stay.

        Returns:
            The loss; None where all of the batch is padding.

        Raises:
            ValueError: the output is of another shape than it should be.
        """
        args, kwargs = self.call(batch) if precision is None else _in_precision(self.call(batch), precision)
        output = main_tensor(block(*args, **kwargs))
        wide = torch.promote_types(output.dtype, torch.float32)
        target = self.target(batch).to(output.device, wide)
        if output.shape != target.shape:
            raise ValueError(
                f"the output has shape {tuple(output.shape)}, and {tuple(target.shape)} in the original model: how long it is "
                "follows from numbers that the model computes, so that the two cannot be compared. Leave out `sequential` and "
                "`refine`."
            )
        features = -1 if output.ndim <= 3 else tuple(range(1, output.ndim))  # of a token, or of an image
        errors = (output.to(wide) - target).square().sum(features)
        relative = (errors / target.square().sum(features).clamp(min=torch.finfo(wide).tiny)).log1p().flatten()
        mask = self.mask(batch, output)
        counted = relative if mask is None or len(mask) != len(relative) else relative[mask]
        return counted.mean() if len(counted) else None

    @torch.no_grad()
    def error(self, block: nn.Module, batches: Sequence[int]) -> float:
        """The mean loss over batches of these numbers, but for those of padding only, in the block's own precision.

        0 where all of them are.
        """
        losses = [float(loss) for batch in batches if (loss := self.loss(block, batch)) is not None]
        return sum(losses) / max(1, len(losses))


def refine_block(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    task: Task,
    count: int,
    options: Refinement,
    before_epoch: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train parameters of a block, in place, to reproduce what the original block computes.

    The parameters of the epoch with the least error on the batches held out are taken, rounded to the block's dtype; where no
    epoch lowers that error, the parameters stay as they were, to the bit.

    Args:
        block: in eval mode; its parameters may be of any floating dtype.
        parameters: some of the block's.
        task: what to reproduce.
        count: number of batches.
        options: how to train.
        before_epoch: called before each epoch, for progress bars.

    Returns:
        Errors on the batches held out, or on those trained on where there are no others: before, and after each epoch.

    Raises:
        FloatingPointError: the block's output is not finite before training.
        ValueError: the block's output has no gradient, or another shape than it should have.

    Source: block-wise refinement of AA-SVD, arXiv:2604.02119.
    """
    train, held = options.split(count)
    held = held or train
    start = [parameter.detach().clone() for parameter in parameters]
    errors = [task.error(block, held)]
    if not math.isfinite(errors[0]):
        raise FloatingPointError(f"the output of the block is not finite (error {errors[0]}).")
    if not parameters:
        return errors
    # Half precision would lose small updates: a float32 copy is trained, and rounded for each check.
    precision = torch.promote_types(start[0].dtype, torch.float32)
    master = block if all(p.dtype == precision for p in block.parameters()) else copy.deepcopy(block).to(precision)
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    trained = [master.get_parameter(names[id(parameter)]) for parameter in parameters]
    best = start
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        rates = [{"params": [parameter], "lr": options.learning_rate * _size(parameter)} for parameter in trained]
        optimizer = torch.optim.AdamW(rates, weight_decay=options.weight_decay)
        steps = options.epochs * len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps, options.warmup))
        generator = torch.Generator().manual_seed(options.seed)
        epochs_without = 0  # improvement
        for _ in range(options.epochs):
            before_epoch()
            for index in torch.randperm(len(train), generator=generator, device="cpu").tolist():
                with _autocast(options.autocast, trained[0].device):
                    loss = task.loss(master, train[index], precision)
                if loss is not None:
                    if not loss.requires_grad:
                        raise ValueError(
                            "its output has no gradient, since it computes without one, as reversible layers do. Leave out "
                            "`refine`."
                        )
                    loss.backward()
                    if torch.isfinite(nn.utils.clip_grad_norm_(trained, options.max_grad_norm)):
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                schedule.step()
            _assign(parameters, trained)
            errors.append(task.error(block, held))
            epochs_without += 1
            if errors[-1] < min(errors[:-1]):
                best, epochs_without = [parameter.detach().clone() for parameter in parameters], 0
            if options.patience is not None and epochs_without >= options.patience:
                break
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
        _assign(parameters, best)
    return errors


def _size(parameter: Tensor) -> float:
    """Root mean square of a parameter, but at least that of a small bias."""
    return max(LEAST_SIZE, float(parameter.detach().float().square().mean().sqrt()))


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        if parameter is not value:
            parameter.copy_(value)


def _in_precision(call: Call, precision: torch.dtype) -> Call:
    return tree_map(lambda leaf: leaf.to(precision) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, call)


def _autocast(dtype: str | None, device: torch.device) -> AbstractContextManager[Any]:
    if dtype == "bfloat16" and not computes_bfloat16(device):
        dtype = None
    return torch.autocast(device.type, dtype=None if dtype is None else getattr(torch, dtype), enabled=dtype is not None)


def _learning_rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then cosine decay to 0; a factor of the peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
