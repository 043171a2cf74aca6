"""Statistics are gathered in groups that fit into memory; what needs the others' statistics is in one group with them."""

from __future__ import annotations

import pytest
from support.models import qwen_moe
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.compression.passes import passes_within
from reparam_peft.layers.neuron_groups import NeuronGroup, Producer
from reparam_peft.tuner.selection import select_targets
from reparam_peft.tuner.targets import Target

LINEAR = 8 * 3 * 32**2  # bytes that the statistics of a square layer take


def squares(count: int) -> dict[str, Target]:
    model = nn.ModuleDict({str(i): nn.Linear(32, 32) for i in range(count)})
    return select_targets(model, ReparamConfig(target_modules=[str(i) for i in range(count)]), "default")


def test_groups_are_filled_up_in_order() -> None:
    assert passes_within(squares(5), 2 * LINEAR, [], []) == [["0", "1"], ["2", "3"], ["4"]]
    with pytest.raises(ValueError, match=r"0: its statistics take 24,576 bytes, and `max_memory` is 24,575; raise it"):
        passes_within(squares(5), LINEAR - 1, [], [])


def test_what_reads_neurons_comes_before_what_makes_them() -> None:
    mlp = NeuronGroup((Producer("1", "rows"),), "3", 32)
    assert passes_within(squares(4), 2 * LINEAR, [], [mlp]) == [["3", "0"], ["1", "2"]]


def test_experts_of_a_layer_are_together() -> None:
    config = ReparamConfig(target_modules=["q_proj"], target_parameters="all-experts")
    targets = select_targets(qwen_moe(), config, "default")
    parameters = {name.rpartition(".")[0] for name in targets if ".experts." in name}
    groups = passes_within(targets, 200_000, [], [], parameters)
    assert len(groups) > 1
    for parameter in parameters:
        assert sum(any(name.startswith(parameter) for name in group) for group in groups) == 1
