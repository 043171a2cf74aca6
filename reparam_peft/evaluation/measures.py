"""How good a model is, as a search asks: a name or a function, which way is up, and how much worse is still good enough."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from ..arguments import check_count
from ..runtime.processes import fails_together, first_of
from .harness import HarnessTask
from .perplexity import accuracy, perplexity


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
    def of(cls, tolerance: float | str) -> Tolerance:
        """What a number or a percentage, such as "5%", says.

        Raises:
            ValueError: it is neither, or negative.
        """
        percentage = tolerance.strip() if isinstance(tolerance, str) else ""
        relative = percentage.endswith("%")
        try:
            amount = float(percentage.removesuffix("%")) / 100 if relative else float(tolerance)
        except (TypeError, ValueError):
            amount = math.nan
        if not 0 <= amount < math.inf:
            raise ValueError(f'`tolerance` must be a number of at least 0, or a percentage such as "5%", got {tolerance!r}.')
        return cls(amount, relative)


@dataclass(frozen=True)
class Measure:
    """A metric of a model.

    Attributes:
        name: of it.
        function: of a model.
        higher_is_better: whether higher values are better.
        details: what else it depends on, so that a search goes on with the same metric only.
    """

    name: str
    function: Callable[[nn.Module], float]
    higher_is_better: bool
    details: str = ""

    def of(self, model: nn.Module) -> float:
        """The metric of a model; the worst there is where the model has become so bad that it is not finite.

        Every process of a distributed run measures, and all get what the first one has measured.

        Raises:
            TypeError: the function returns no number.
        """
        with fails_together():
            try:
                value = self.function(model)
            except (FloatingPointError, OverflowError):
                value = math.nan
            if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
                raise TypeError(f"`metric` must return a number, got {value!r}.")
            value = float(value)
        value = first_of(value)
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
        """Whether a value is as good as a limit, but for rounding: 0.45 is within 0.1 of 0.55."""
        better = value > limit if self.higher_is_better else value < limit
        return better or math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-12)

    def best(self, values: Sequence[float]) -> float:
        """The best of some values; NaN of none."""
        return (max if self.higher_is_better else min)(values, default=math.nan)


def measure_named(
    metric: str | Callable[[nn.Module], float],
    evaluation: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    higher_is_better: bool | None,
    documents: int | None = None,
) -> Measure:
    """The measure that a name or a function stands for; arguments as for `search`.

    Raises:
        TypeError, ValueError: it is neither, or what it needs is missing.
        ImportError: lm-evaluation-harness is not installed.
    """
    is_task = isinstance(metric, str) and metric not in ("perplexity", "accuracy")
    if documents is not None and not is_task:
        raise ValueError(f"`documents={documents!r}` is for a task of lm-evaluation-harness, and `metric` is none.")
    if documents is not None:
        check_count("documents", documents)
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Measure(name, metric, bool(higher_is_better), details=_fingerprint(metric))
    if not isinstance(metric, str):
        raise TypeError(f"`metric` must be a name or a function of a model, got {metric!r}.")
    if is_task:
        task = HarnessTask.named(metric, tokenizer, documents)
        higher = task.higher_is_better if higher_is_better is None else higher_is_better
        if higher is None:
            raise ValueError(
                f"{task.name}: the task does not say whether higher is better. Add `higher_is_better` to its `metric_list`, "
                "or to the arguments."
            )
        return Measure(task.name, task.of, higher, task.details)
    if not evaluation:
        raise ValueError(f"`metric={metric!r}` needs batches to evaluate on; give them as `evaluation`.")
    batches = list(evaluation)
    function = perplexity if metric == "perplexity" else accuracy
    higher = metric == "accuracy" if higher_is_better is None else higher_is_better
    return Measure(metric, lambda model: function(model, batches), higher)


def _fingerprint(function: Callable[..., Any]) -> str:
    """SHA-256 of where a function stands, what it computes, and the plain values that it has from around it."""
    code = getattr(function, "__code__", None)
    around = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    given = [*around, *(getattr(function, "__defaults__", None) or ())]
    plain = [value if isinstance(value, (bool, int, float, str, tuple)) else type(value).__qualname__ for value in given]
    named = function if hasattr(function, "__qualname__") else type(function)
    return hashlib.sha256(f"{named.__module__} {named.__qualname__} {_parts(code)} {plain}".encode()).hexdigest()


def _parts(code: CodeType | None) -> list[Any]:
    """What a function computes, without the lines and the file that it stands in."""
    if code is None:
        return []
    constants = [_parts(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return [code.co_code, code.co_names, constants]
