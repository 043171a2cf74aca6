"""What is chosen where a config leaves it open, by a plan or by default."""

from __future__ import annotations

import pytest
from support.compressing import TEXT, planned
from support.models import llama

from reparam_peft import Plan, ReparamConfig
from reparam_peft.compression.choices import with_defaults


def test_without_a_plan_they_are_the_defaults_of_compress() -> None:
    given = ReparamConfig(target_modules="all-linear", form="factors")
    chosen = with_defaults(given)
    assert (chosen.method, chosen.allocation, chosen.form, chosen.moved_bias) == ("whitened", "loss", "factors", True)
    assert (given.method, given.allocation, given.moved_bias) == (None, None, False), "the config itself stays as it is"
    assert with_defaults(ReparamConfig(target_modules="all-linear", r=4)).allocation == "uniform"


@pytest.mark.parametrize("budget", [None, "bytes", "flops"])
def test_with_a_plan_they_are_those_of_the_plan(budget: str | None) -> None:
    plan = planned(llama(), TEXT, target_modules="all-linear", keep=0.6, budget=budget)
    chosen = with_defaults(ReparamConfig(target_modules="all-linear"), plan)
    assert (chosen.keep, chosen.method, chosen.allocation, chosen.form) == (0.6, plan.method, plan.allocation, plan.form)
    assert (chosen.budget, chosen.r) == (budget, None)


def test_a_config_that_is_filled_in_is_refused() -> None:
    with pytest.raises(ValueError, match="is that of a compressed model"):
        with_defaults(ReparamConfig(target_modules="all-linear", stored_parameters=3))


def test_a_plan_says_what_its_budget_is_of_and_the_rank_of_corrections() -> None:
    made = with_defaults(ReparamConfig(), Plan((), 0.2, "whitened", "loss", "pivot", budget="bytes"))
    assert (made.budget, made.keep, made.form, made.neurons) == ("bytes", 0.2, "pivot", False)
    corrected = with_defaults(ReparamConfig(), Plan((), 0.8, "whitened", "uniform", "corrected"))
    assert (corrected.budget, corrected.form, corrected.r) == (None, "corrected", 1)
    plain = with_defaults(ReparamConfig())
    assert (plain.budget, plain.neurons) == (None, None)
