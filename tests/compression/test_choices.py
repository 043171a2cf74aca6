"""What is chosen where a config leaves it open, by a plan or by default."""

from __future__ import annotations

import pytest
from support.compressing import TEXT, planned
from support.models import llama

from reparam_peft import Plan, ReparamConfig
from reparam_peft.compression.choices import with_defaults
from reparam_peft.planning.module_plan import ModulePlan


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


@pytest.mark.parametrize("filled_in", [{"form_pattern": {"a": "factors"}}, {"bit_pattern": {"a": 8}}, {"correction_bits": 8}])
def test_what_the_model_fills_in_of_few_bits_is_refused(filled_in: dict) -> None:
    with pytest.raises(ValueError, match="is filled in by the model"):
        with_defaults(ReparamConfig(target_modules="all-linear", rank_pattern={"a": 4}, **filled_in))


@pytest.mark.parametrize(
    ("allowed", "match"),
    [({"bits": (16, 8)}, "in 4 bits, and the config says"), ({"form": "pivot"}, "in the form 'factors', and the config says")],
)
def test_a_plan_of_what_the_config_does_not_allow_is_refused(allowed: dict, match: str) -> None:
    modules = (
        ModulePlan("a", (64, 64), 64, 4096, form="dense", bits=4),
        ModulePlan("b", (64, 64), 16, 2048, form="factors", bits=8),
    )
    plan = Plan(modules, 0.3, "whitened", "loss", "pivot", budget="bytes")
    with_defaults(ReparamConfig(budget="bytes", bits=(8, 4)), plan)
    with pytest.raises(ValueError, match=match):
        with_defaults(ReparamConfig(budget="bytes", **allowed), plan)


def test_a_plan_says_what_its_budget_is_of_and_the_rank_of_corrections() -> None:
    made = with_defaults(ReparamConfig(), Plan((), 0.2, "whitened", "loss", "pivot", budget="bytes"))
    assert (made.budget, made.keep, made.form, made.neurons) == ("bytes", 0.2, "pivot", False)
    corrected = with_defaults(ReparamConfig(), Plan((), 0.8, "whitened", "uniform", "corrected"))
    assert (corrected.budget, corrected.form, corrected.r) == (None, "corrected", 1)
    plain = with_defaults(ReparamConfig())
    assert (plain.budget, plain.neurons) == (None, None)
