"""What a search looks for, and among what: the arguments of `search`, and their checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torch import nn

from ..arguments import check_count
from ..compression.choices import with_defaults
from ..config.few_bits import check_one_shot
from ..config.reparam_config import ReparamConfig
from ..defaults import CALIBRATED
from ..evaluation.measures import Measure, Tolerance, measure_named
from ..numerics.methods import METHODS, MethodName

Metric: TypeAlias = str | Callable[[nn.Module], float]


@dataclass(frozen=True)
class Goal:
    """What a search looks for, and among what; not checked yet.

    Attributes:
        metric: what is measured, by its name, or a function of a model.
        tolerance: how much worse it may get: a percentage, or a number in its own unit.
        evaluation: batches for "perplexity" and "accuracy".
        tokenizer: for a task of lm-evaluation-harness.
        documents: the most documents of such a task; None: all.
        higher_is_better: of the metric; None: as its name has it.
        keeps: the sizes to choose from; None: 0.05 to 0.99 in steps of 0.01.
        methods: each of which is tried; None: the config's.
        max_trials: the most trials of each method.
    """

    metric: Metric = "perplexity"
    tolerance: float | str = "5%"
    evaluation: Sequence[Mapping[str, Any]] | None = None
    tokenizer: Any = None
    documents: int | None = None
    higher_is_better: bool | None = None
    keeps: Sequence[float] | None = None
    methods: Sequence[str] | None = None
    max_trials: int = 10


@dataclass(frozen=True)
class CheckedGoal:
    """A goal whose parts are known to make sense.

    Attributes:
        measure: what is measured.
        tolerance: how much worse it may get.
        keeps: the sizes to choose from, rising.
        methods: each of which is tried.
    """

    measure: Measure
    tolerance: Tolerance
    keeps: list[float]
    methods: list[str]


def check_goal(goal: Goal, config: ReparamConfig) -> CheckedGoal:
    """The goal of a search with a config, its values checked before any work.

    Raises:
        TypeError, ValueError: a value is wrong, or has no effect with the config.
        ImportError: lm-evaluation-harness is needed and not installed.
    """
    sizes = goal.keeps if goal.keeps is not None else [i / 100 for i in range(5, 100)]
    keeps = sorted({float(keep) for keep in sizes})
    methods = list(goal.methods or [config.method or CALIBRATED["method"]])
    if config.r is not None:
        raise ValueError(f"`r={config.r!r}` fixes the size, which is what a search finds; leave it out of the config.")
    check_one_shot(config, "`search`")
    if not config.init_weights:
        raise ValueError("`init_weights=False` gives random factors, of which there is no best size; leave it out.")
    if not keeps or not 0 < keeps[0] <= keeps[-1] <= 1:
        raise ValueError(f"`keeps` must be fractions in (0, 1], got {keeps}.")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"`methods` must hold some of {', '.join(map(repr, METHODS))}, got {method!r}.")
        if not METHODS[method].nested:
            raise ValueError(f"`methods` cannot hold {method!r}: its factors of one rank are no part of those of another.")
    for method in methods:
        with_defaults(config_with(config, method=method))  # raises where a field has no effect with it
    check_count("max_trials", goal.max_trials)
    tolerance = Tolerance.of(goal.tolerance)
    measure = measure_named(goal.metric, goal.evaluation, goal.tokenizer, goal.higher_is_better, goal.documents)
    return CheckedGoal(measure, tolerance, keeps, methods)


def config_with(config: ReparamConfig, *, method: str, keep: float | None = None) -> ReparamConfig:
    """A copy of a config with another method, and another size unless that is None; nothing is checked anew."""
    copied = copy.deepcopy(config)
    copied.method = cast(MethodName, method)
    if keep is not None:
        copied.keep = keep
    return copied
