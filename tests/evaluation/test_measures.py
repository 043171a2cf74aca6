"""Measures of a model: rounding, values that are not finite, and names that need another library."""

from __future__ import annotations

import math
import sys

import pytest
from support.models import byte_tokenizer
from torch import nn

from reparam_peft.evaluation.measures import Measure, Tolerance, measure_named


def test_rounding_decides_nothing() -> None:
    score = Measure("accuracy", lambda model: 0.0, True)
    limit = score.limit(0.55, Tolerance.of(0.1))
    assert limit > 0.45
    assert score.within(0.45, limit)
    assert not score.within(0.449, limit)
    assert not Measure("loss", lambda model: 0.0, False).within(math.inf, 1.0)


def test_a_metric_that_is_not_finite_is_the_worst() -> None:
    def broken(model: nn.Module) -> float:
        raise FloatingPointError

    assert Measure("loss", broken, False).of(nn.Linear(1, 1)) == math.inf
    assert Measure("perplexity", lambda model: math.exp(1000), False).of(nn.Linear(1, 1)) == math.inf
    assert Measure("score", lambda model: math.nan, True).of(nn.Linear(1, 1)) == -math.inf


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match="reparam_peft\\[harness\\]"):
        measure_named("hellaswag", None, byte_tokenizer(), None)


def test_functions_are_told_by_what_they_compute() -> None:
    def scored(limit: float) -> str:
        return measure_named(lambda model: limit, None, None, None).details

    assert scored(1.0) == scored(1.0) != scored(2.0)
    first, second = (measure_named(metric, None, None, None).details for metric in (lambda model: 1.0, lambda model: 5.0))
    assert first != second
    assert measure_named(nn.Identity(), None, None, None).details != measure_named(nn.ReLU(), None, None, None).details
