"""Statistics are gathered in groups that fit into memory; what needs the others' statistics is in one group with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compressing import TEXT
from support.models import bert, llama, qwen_moe
from torch import nn

from reparam_peft import ReparamConfig, calibrate
from reparam_peft.compression.passes import (
    MaxMemory,
    bytes_of_statistics,
    passes_by_block,
    passes_within,
    room_beside,
    room_for_graphs,
)
from reparam_peft.layers.neuron_groups import NeuronGroup, Producer
from reparam_peft.tuner.selection import select_targets
from reparam_peft.tuner.targets import Target

LINEAR = 8 * 3 * (32 * 33 // 2)  # bytes that the statistics of a square layer take


def asked_for(memory: int) -> MaxMemory:
    return MaxMemory(memory, is_asked_for=True)


def squares(count: int) -> dict[str, Target]:
    model = nn.ModuleDict({str(i): nn.Linear(32, 32) for i in range(count)})
    return select_targets(model, ReparamConfig(target_modules=[str(i) for i in range(count)]), "default")


def test_groups_are_filled_up_in_order() -> None:
    assert passes_within(squares(5), asked_for(2 * LINEAR), [], []) == [["0", "1"], ["2", "3"], ["4"]]
    with pytest.raises(ValueError, match=r"0: its statistics take 12,672 bytes, and `max_memory` is 12,671; raise it"):
        passes_within(squares(5), asked_for(LINEAR - 1), [], [])


def test_where_nobody_asked_a_target_that_takes_more_has_a_pass_of_its_own() -> None:
    assert passes_within(squares(3), MaxMemory(LINEAR - 1, is_asked_for=False), [], []) == [["0"], ["1"], ["2"]]


def test_groups_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "reparam_peft"):
        passes_within(squares(5), asked_for(5 * LINEAR), [], [])
        assert caplog.messages == ["Statistics of 5 targets take at most 63,360 bytes."]
        passes_within(squares(5), asked_for(2 * LINEAR), [], [])
    assert "25,344 bytes of them may be held at a time" in caplog.text
    assert "for 3 groups of targets to plan, and for 2 again to factorise" in caplog.text


@pytest.mark.parametrize("build", [llama, bert])
def test_what_statistics_take_is_foreseen(build: Callable[[], nn.Module]) -> None:
    config, model = ReparamConfig(target_modules="all-linear", neurons=False), build()
    taken = calibrate(model, config, TEXT, progress=False).nbytes
    assert taken <= bytes_of_statistics(select_targets(model, config, "default")) <= 1.2 * taken


def test_what_is_left_beside_the_largest_group() -> None:
    targets, passes = squares(5), [["0", "1"], ["2"]]
    assert room_beside(passes, targets, asked_for(3 * LINEAR)) == LINEAR
    assert room_beside(passes, targets, asked_for(LINEAR)) == 0
    assert room_beside(passes, targets, None) > 2**40


@pytest.mark.parametrize(("given", "number"), [(5, 5), ("1GB", 10**9), ("0.5MiB", 2**19)])
def test_memory_as_it_is_asked_for(given: int | str, number: int) -> None:
    assert MaxMemory.of(given, torch.device("cpu")) == asked_for(number)


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), ("much", ValueError), (1.5, TypeError), (True, TypeError)])
def test_memory_that_is_no_number_of_bytes(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`max_memory` must be a .*number of bytes, .*text such as '1GB'.*got {given!r}"):
        MaxMemory.of(given, torch.device("cpu"))


def test_without_a_number_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam_peft.compression.passes.free_memory", lambda device: 1001)
    assert MaxMemory.of(None, torch.device("cpu")) == MaxMemory(500, is_asked_for=False)


def test_what_reads_neurons_comes_before_what_makes_them() -> None:
    mlp = NeuronGroup((Producer("1", "rows"),), "3", 32)
    assert passes_within(squares(4), asked_for(2 * LINEAR), [], [mlp]) == [["3", "0"], ["1", "2"]]


def test_by_block_groups_lie_within_blocks() -> None:
    mlp = NeuronGroup((Producer("b.1", "rows"),), "b.3", 32)
    model = nn.ModuleDict({name: nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))) for name in "ab"})
    model["c"] = nn.Linear(32, 32)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = select_targets(model, ReparamConfig(target_modules=names), "default")
    groups = passes_by_block(targets, asked_for(3 * LINEAR), ["b", "a"], [mlp])
    assert groups == [["c"], ["b.3", "b.0", "b.1"], ["b.2"], ["a.0", "a.1", "a.2"], ["a.3"]]
    with pytest.raises(ValueError, match="raise it"):
        passes_by_block(targets, asked_for(LINEAR - 1), ["b", "a"], [mlp])


def test_graphs_get_half_of_what_is_left_where_a_number_was_asked_for() -> None:
    targets, passes = squares(3), [["0"], ["1"], ["2"]]
    assert room_for_graphs(passes, targets, asked_for(3 * LINEAR)) == LINEAR
    assert room_for_graphs(passes, targets, MaxMemory(3 * LINEAR, is_asked_for=False)) is None
    assert room_for_graphs(passes, targets, None) is None


def test_experts_of_a_layer_are_together() -> None:
    config = ReparamConfig(target_modules=["q_proj"], target_parameters="all-experts")
    targets = select_targets(qwen_moe(), config, "default")
    parameters = {name.rpartition(".")[0] for name in targets if ".experts." in name}
    groups = passes_within(targets, asked_for(110_000), [], [], parameters)
    assert len(groups) > 1
    for parameter in parameters:
        assert sum(any(name.startswith(parameter) for name in group) for group in groups) == 1
