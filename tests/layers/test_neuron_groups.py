from __future__ import annotations

import pytest
import torch

from reparam_peft.layers.neuron_groups import NeuronGroup, Producer, rows_of


@pytest.mark.parametrize("layout", ["rows", "split", "interleaved"])
def test_rows_of_kept_neurons_keep_the_layout(layout: str) -> None:
    neurons = torch.arange(5)
    labels = {"rows": neurons, "split": neurons.repeat(2), "interleaved": neurons.repeat_interleave(2)}
    kept = torch.tensor([0, 3, 4])
    rows = rows_of(layout, kept, 5)
    assert (rows.diff() > 0).all()
    smaller = {"rows": kept, "split": kept.repeat(2), "interleaved": kept.repeat_interleave(2)}
    assert torch.equal(labels[layout][rows], smaller[layout])


@pytest.mark.parametrize("kept", [[1, 0], [2, 2], [0, 5], [-1, 0]])
def test_kept_neurons_are_checked(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`kept` must be ascending numbers in \[0, 5\), got"):
        rows_of("rows", torch.tensor(kept), 5)
    with pytest.raises(ValueError, match="`layout` must be"):
        rows_of("columns", torch.tensor([0]), 5)


def test_sizes_of_a_fused_producer_lose_two_rows_for_each_neuron() -> None:
    group = NeuronGroup((Producer("gate_up", "split"),), "down", 8)
    assert group.names == ["gate_up", "down"]
    assert group.sizes({"gate_up": (16, 4), "down": (4, 8)}, 5) == {"gate_up": (10, 4), "down": (4, 5)}
