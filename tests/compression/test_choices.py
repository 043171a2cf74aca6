"""The choices that a config leaves open."""

from __future__ import annotations

from reparam_peft import Plan, ReparamConfig
from reparam_peft.compression.choices import with_defaults


def test_a_plan_says_what_its_budget_is_of_and_the_rank_of_corrections() -> None:
    made = with_defaults(ReparamConfig(), Plan((), 0.2, "whitened", "loss", "pivot", budget="bytes"))
    assert (made.budget, made.keep, made.form, made.neurons) == ("bytes", 0.2, "pivot", False)
    corrected = with_defaults(ReparamConfig(), Plan((), 0.8, "whitened", "uniform", "corrected"))
    assert (corrected.budget, corrected.form, corrected.r) == (None, "corrected", 1)
    plain = with_defaults(ReparamConfig())
    assert (plain.budget, plain.neurons) == (None, None)
