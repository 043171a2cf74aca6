"""What a search measures: a name or a function, which way is up, and how much worse is still good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .evaluation import accuracy, perplexity


@dataclass(frozen=True)
class Tolerance:
    """How much worse is good enough.

    Attributes:
        amount: ≥ 0, in the metric's own unit, or a fraction of its value.
        relative: whether it is such a fraction.
    """

    amount: float
    relative: bool

    @classmethod
    def of(cls, given: float | str) -> Tolerance:
        """What a number or a percentage, such as "5%", says.

        Raises:
            ValueError: it is neither, or negative.
        """
        relative = isinstance(given, str) and given.strip().endswith("%")
        try:
            amount = float(given.strip().removesuffix("%")) / 100 if relative else float(given)
        except (TypeError, ValueError):
            amount = math.nan
        if not 0 <= amount < math.inf:
            raise ValueError(f'`tolerance` must be a number of at least 0, or a percentage such as "5%", got {given!r}.')
        return cls(amount, relative)


@dataclass(frozen=True)
class Measure:
    """A metric of a model.

    Attributes:
        name: of it.
        function: of a model.
        higher_is_better: whether higher values are better.
    """

    name: str
    function: Callable[[nn.Module], float]
    higher_is_better: bool

    def of(self, model: nn.Module) -> float:
        """The metric of a model; the worst there is where the model has become so bad that it is not finite.

        Raises:
            TypeError: the function returns no number.
        """
        try:
            value = self.function(model)
        except FloatingPointError:
            value = math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
            raise TypeError(f"`metric` must return a number, got {value!r}.")
        value = float(value)
        return value if math.isfinite(value) else (-math.inf if self.higher_is_better else math.inf)

    def limit(self, dense: float, tolerance: Tolerance) -> float:
        """The worst value within a tolerance of the dense model's.

        Raises:
            ValueError: the dense model's metric is not finite.
        """
        if not math.isfinite(dense):
            raise ValueError(f"the {self.name} of the dense model is not finite, so that nothing can be compared with it.")
        amount = tolerance.amount * (abs(dense) if tolerance.relative else 1)
        return dense - amount if self.higher_is_better else dense + amount

    def within(self, value: float, limit: float) -> bool:
        """Whether a value is as good as a limit."""
        return value >= limit if self.higher_is_better else value <= limit

    def best(self, values: Sequence[float]) -> float:
        """The best of some values; NaN of none."""
        return (max if self.higher_is_better else min)(values, default=math.nan)


def measure_named(
    metric: str | Callable[[nn.Module], float] | Measure,
    evaluation: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    higher_is_better: bool | None,
) -> Measure:
    """The measure that a name or a function stands for; arguments as for `search`.

    Raises:
        TypeError, ValueError: it is neither, or what it needs is missing.
        ImportError: lm-evaluation-harness is not installed.
    """
    if isinstance(metric, Measure):
        return metric
    if callable(metric):
        return Measure(getattr(metric, "__name__", type(metric).__name__), metric, bool(higher_is_better))
    if not isinstance(metric, str):
        raise TypeError(f"`metric` must be a name or a function of a model, got {metric!r}.")
    if metric in ("perplexity", "accuracy"):
        if not evaluation:
            raise ValueError(f"`metric={metric!r}` needs batches to evaluate on; give them as `evaluation`.")
        batches = list(evaluation)
        function = perplexity if metric == "perplexity" else accuracy
        higher = metric == "accuracy" if higher_is_better is None else higher_is_better
        return Measure(metric, lambda model: function(model, batches), higher)
    return _harness(metric, tokenizer, higher_is_better)


def _harness(metric: str, tokenizer: Any, higher_is_better: bool | None) -> Measure:
    """A task of lm-evaluation-harness: by its name or the YAML file of it, and `:` and one of its metrics after it."""
    if tokenizer is None:
        raise ValueError(f"`metric={metric!r}` is taken for a task of lm-evaluation-harness, which needs a `tokenizer`.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"`metric={metric!r}` needs lm-evaluation-harness: pip install 'reparam_peft[harness]'") from error
    task, _, wanted = (metric, "", "") if Path(metric).is_file() else metric.partition(":")
    in_file = Path(task).is_file()
    manager = TaskManager(include_defaults=not in_file)  # to know the thousands of them takes seconds
    if task not in manager.all_tasks and not in_file:
        raise ValueError(
            f"`metric={metric!r}` is neither 'perplexity', 'accuracy', a task of lm-evaluation-harness, nor a file with one."
        )
    loaded = manager.load([task])  # with its data, so that what is missing is missed before any work
    name = next(iter([*loaded["groups"], *loaded["tasks"]]))
    if len(loaded["tasks"]) > 1 and not loaded["groups"]:
        raise ValueError(f"`metric={metric!r}` stands for several tasks; name one: {', '.join(loaded['tasks'])}.")
    directions = {own: up for part in loaded["tasks"].values() for own, up in part.higher_is_better().items()}
    wanted = wanted or next(iter(directions))
    if wanted not in directions:
        raise ValueError(f"task {task!r} has no metric {wanted!r}, only {', '.join(directions)}.")

    def function(model: nn.Module) -> float:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
        run = lm_eval.simple_evaluate(wrapped, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False)
        figures = run["results"][name]
        # Keys are a metric and the filter of answers that it is taken after; the first filter is the task's main one.
        key = next((key for key in figures if key.partition(",")[0] == wanted), None)
        if key is None:
            raise ValueError(f"{task!r} gives no {wanted} of all its tasks, only {', '.join(figures)}; name one of the tasks.")
        return figures[key]

    return Measure(f"{name}:{wanted}", function, directions[wanted] if higher_is_better is None else higher_is_better)
