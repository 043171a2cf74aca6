"""What matrices take of budgets of multiply-adds and of time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reparam_peft.numerics.storage import Storage
from reparam_peft.planning.allocation import points
from reparam_peft.planning.costs import MultiplyAdds, Nanoseconds, cost_of
from reparam_peft.planning.neurons import Losses
from reparam_peft.planning.ranks import RankChooser

LINEAR, PIVOT = Storage(60, 40, bias=True), Storage(60, 40, "pivot", bias=True)


def test_multiply_adds_are_those_of_the_matrices_for_each_row() -> None:
    costs = MultiplyAdds({"a": 3}, {"table"})
    assert costs.cost("a", LINEAR, None) == 3 * 60 * 40
    assert costs.cost("a", LINEAR, 7) == 3 * 7 * (60 + 40)
    assert costs.cost("a", PIVOT, 7) == 3 * 7 * (60 + 40 - 7)
    assert costs.cost("unknown", Storage(30, 40, whole=(60, 40)), 30) == 30 * 40
    assert costs.cost("table", LINEAR, None) == 0
    assert costs.cost("table", LINEAR, 7) == 60 * 7


def test_times_lie_between_those_that_were_measured_and_rise() -> None:
    costs = Nanoseconds({"a": 1000}, {"a": {1: 100, 10: 80, 20: 300}})
    assert costs.cost("a", LINEAR, None) == 1000
    assert [costs.cost("a", LINEAR, rank) for rank in (1, 5, 10, 15, 20, 40)] == [100, 100, 100, 200, 300, 300]
    with pytest.raises(ValueError, match="lost neurons was not measured"):
        costs.cost("a", Storage(30, 40, whole=(60, 40)), 3)


def test_points_of_equal_cost_are_those_of_the_least_loss() -> None:
    costs = Nanoseconds({"a": 1000}, {"a": {1: 100, 10: 80, 20: 300}})
    curve = points(torch.ones(40, dtype=torch.float64), LINEAR, 5, cost=cost_of(costs, "a", LINEAR))
    assert [point.rank for point in curve[:2]] == [10, 15]
    assert all(one.cost < other.cost and one.loss > other.loss for one, other in pairwise(curve))


def test_a_module_of_many_rows_gets_less_under_a_budget_of_multiply_adds() -> None:
    storages = {"often": LINEAR, "rarely": LINEAR}
    losses = Losses(dict.fromkeys(storages, torch.linspace(1, 0.01, 40, dtype=torch.float64)))
    costs = MultiplyAdds({"often": 90, "rarely": 10})
    chooser = RankChooser(storages, 0.5, costs=costs, rank_multiple=1)
    ranks = chooser.ranks(losses).ranks
    stored = RankChooser(storages, 0.5, rank_multiple=1).ranks(losses).ranks
    assert stored["often"] == stored["rarely"]
    assert ranks["rarely"] is None
    assert sum(costs.cost(name, LINEAR, rank) for name, rank in ranks.items()) <= chooser.budget == 0.5 * 100 * 60 * 40
    with pytest.raises(ValueError, match=r"allows .* multiply-adds, and the least that can be stored is"):
        RankChooser(storages, 0.01, costs=costs, rank_multiple=8).ranks(losses)
