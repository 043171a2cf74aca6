"""Budgets of multiply-adds and of time, through `compress`, `plan` and files of plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.batches import images
from support.compressing import TEXT, compressed, config_of, planned
from support.models import convnet, llama, qwen_moe

from reparam_peft import Plan, ReparamConfig
from reparam_peft.compression import costs as measuring
from reparam_peft.compression.costs import costs_of
from reparam_peft.numerics.storage import Storage
from reparam_peft.planning.costs import MultiplyAdds
from reparam_peft.tuner.selection import select_targets

ALL = {"target_modules": "all-linear", "rank_multiple": 1}


def multiply_adds(plan: Plan, lookups: frozenset[str] = frozenset()) -> float:
    """The fraction of them that stays, counted from the plan."""
    costs = MultiplyAdds({module.name: module.tokens for module in plan.modules}, lookups)
    storages = {m.name: Storage(*(m.size or m.shape), plan.form, whole=m.shape) for m in plan.modules}
    stored = sum(costs.cost(m.name, storages[m.name], m.rank) for m in plan.modules)
    return stored / sum(costs.cost(m.name, storages[m.name], None) for m in plan.modules)


def test_convolutions_count_for_each_of_their_positions() -> None:
    batches = [images(8, (3, 16, 16), "x", seed=seed) for seed in range(3)]
    options = {"target_modules": ["conv0", "conv1", "head"], "rank_multiple": 1, "form": "factors"}
    by_flops = planned(convnet(), batches, keep=0.5, budget="flops", **options)
    assert 0.35 < multiply_adds(by_flops) <= 0.5
    assert by_flops.budget == "flops"
    tokens = {module.name: module.tokens for module in by_flops.modules}
    assert tokens["conv0"] > tokens["head"]
    assert "head" in by_flops.dense_modules, "it computes next to nothing"


def test_experts_count_for_their_tokens_and_tables_for_none() -> None:
    options = {**ALL, "target_parameters": "all-experts"}
    plan = planned(qwen_moe(), TEXT, keep=0.5, budget="flops", **options)
    assert 0.4 < multiply_adds(plan) <= 0.5
    table = planned(llama(), TEXT, keep=0.5, budget="flops", target_modules=["embed_tokens", "q_proj"], rank_multiple=1)
    assert "model.embed_tokens" in table.dense_modules
    assert multiply_adds(table, frozenset({"model.embed_tokens"})) <= 0.5


def test_what_stays_dense_is_held_against_the_budget_that_is_asked_for() -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "dense_modules": ["model.embed_tokens"], "rank_multiple": 1}
    plan = planned(llama(), TEXT, keep=0.4, budget="flops", **options)  # the table has 0.44 of the parameters
    assert multiply_adds(plan, frozenset({"model.embed_tokens"})) <= 0.4
    with pytest.raises(ValueError, match="allows 5,836 parameters"):
        planned(llama(), TEXT, keep=0.4, **options)


def test_time_is_measured_once_for_each_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measuring._times.cache_clear()
    seen: list[torch.Size] = []

    def median(layer: torch.nn.Module, x: torch.Tensor) -> int:
        seen.append(x.shape)
        return 100 * sum(parameter.numel() for parameter in layer.parameters())

    monkeypatch.setattr(measuring, "_median", median)
    small = compressed(llama(), TEXT, keep=0.5, budget="latency", form="factors", **ALL)
    shapes = {tuple(m.shape) for m in small.size_report().matrices}
    assert len(seen) <= len(shapes) * (measuring.RANKS + 4)
    assert {tuple(shape[:2]) for shape in seen} == {(1, measuring.ROWS)}
    assert 0.45 < small.size_report().keep <= 0.5, "here, time is by the numbers stored"
    plan = planned(llama(), TEXT, keep=0.5, budget="latency", form="factors", **ALL)
    plan.save(tmp_path / "plan.json")
    again = compressed(llama(), TEXT, arguments={"plan": Plan.load(tmp_path / "plan.json")}, budget="latency", **ALL)
    assert again.peft_config["default"].rank_pattern == small.peft_config["default"].rank_pattern
    assert again.peft_config["default"].budget == "latency"


def test_all_processes_go_by_the_times_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = select_targets(llama(), config := ReparamConfig(target_modules=["up_proj"], form="pivot"), "default")
    config.budget = "latency"
    monkeypatch.setattr(measuring, "first_of", lambda time: 7.0)
    costs = costs_of(config, targets, {})
    (name, target), *_ = targets.items()
    assert {costs.cost(name, target.storage, rank) for rank in (None, 1, 4, 60)} == {7}


def test_measured_time_is_of_the_layers() -> None:
    targets = select_targets(llama(), config := ReparamConfig(target_modules=["up_proj"], form="pivot"), "default")
    config.budget = "latency"
    costs = costs_of(config, targets, {})
    (name, target), *_ = targets.items()
    assert 0 < costs.cost(name, target.storage, 4) <= costs.cost(name, target.storage, 60)
    assert costs.cost(name, target.storage, None) > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": "latency", "target_modules": ["embed_tokens"]}, "measures linear layers"),
        ({"budget": "latency", "neurons": True, **ALL}, "`neurons=True` and `budget='latency'`"),
        ({"budget": "flops", "allocation": "uniform", "target_modules": "all-linear"}, "is shared out by predicted loss"),
        ({"budget": "flops", "r": 4, "target_modules": "all-linear"}, "`r=4` fixes the ranks"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compressed(llama(), TEXT, **options)


def test_without_data_they_are_refused() -> None:
    for budget in ("flops", "latency"):
        with pytest.raises(ValueError, match=f"`budget='{budget}'` needs calibration data"):
            get_peft_model(llama(), config_of(budget=budget, **ALL))
