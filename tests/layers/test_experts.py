from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.experts import EXPERTS, LAYOUTS, NEURONS, fused, routing
from support.models import gpt_oss, llama, qwen_moe
from support.tolerances import assert_close
from torch import Tensor, nn
from transformers import PreTrainedModel

from reparam_peft.layers.experts import (
    close_experts,
    fused_parameters,
    is_experts,
    is_open,
    neurons_of_experts,
    open_experts,
    routed_rows,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opened_experts_compute_what_fused_ones_do(layout: str) -> None:
    experts = fused(layout)
    expected = experts(*routing())
    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    keys = [name.rpartition(".")[2] for name in fused_parameters(experts)]
    assert len(keys) == 2
    for opened in ([keys[0]], keys):  # one alone, then both
        for key in opened:
            if not is_open(experts, key):
                open_experts(experts, key)
        assert_close(experts(*routing()), expected)
        named = experts(routing()[0], top_k_index=routing()[1], top_k_weights=routing()[2])
        assert_close(named, expected)
    for key in keys:
        assert all(isinstance(layer, nn.Linear) for layer in experts.get_submodule(key))
        close_experts(experts, key)
    assert experts.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in experts.state_dict().items())
    assert "forward" not in vars(experts)
    assert torch.equal(experts(*routing()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opened_experts_copy_nothing_and_can_be_copied(layout: str) -> None:
    experts = fused(layout)
    matrix = experts.down_proj.data_ptr()
    open_experts(experts, "down_proj")
    assert experts.down_proj[0].weight.data_ptr() == matrix
    twin = copy.deepcopy(experts)
    with torch.no_grad():
        twin.down_proj[0].weight.zero_()
    assert not torch.equal(twin(*routing()), experts(*routing()))
    assert_close(twin(*routing()), experts(*routing()) - _of_first(experts))


def _of_first(experts: Any) -> Tensor:
    """What the matrix of the first expert adds to the output."""
    without = copy.deepcopy(experts)
    with torch.no_grad():
        without.down_proj[0].weight.zero_()
    return (experts(*routing()) - without(*routing())).detach()


def test_experts_that_stand_for_none_add_nothing() -> None:
    experts = fused("split")
    for key in ("gate_up_proj", "down_proj"):
        open_experts(experts, key)
    hidden, chosen, weights = routing()
    first_only = experts(hidden, chosen[:, :1], weights[:, :1])
    chosen[:, 1] = EXPERTS  # as expert parallelism marks those of other processes
    assert torch.equal(experts(hidden, chosen, weights), first_only)


def test_experts_that_were_not_chosen_have_gradients_of_zero_where_they_are_trained() -> None:
    experts = fused("interleaved, transposed, with biases")
    expected = torch.autograd.grad(experts(*routing()).sum(), experts.down_proj)[0]
    for key in ("gate_up_proj", "down_proj"):
        open_experts(experts, key)
    experts(*routing()).sum().backward()
    for layer, gradient in zip(experts.down_proj, expected, strict=True):
        assert_close(layer.weight.grad, gradient.mT)
    calls: list[Any] = []
    experts.requires_grad_(False)
    experts.down_proj[2].register_forward_hook(lambda *_: calls.append(1))
    experts(routing()[0].requires_grad_(), *routing()[1:])
    assert not calls


def test_rows_of_an_expert_are_known_while_it_computes() -> None:
    experts = fused("split")
    for key in ("gate_up_proj", "down_proj"):
        open_experts(experts, key)
    seen: list[Any] = []
    experts.down_proj[1].register_forward_hook(lambda *_: seen.append(routed_rows()))
    hidden, chosen, weights = routing()
    chosen[:3, 1] = chosen[:3, 0] = 0
    experts(hidden, chosen, weights)
    assert routed_rows() is None
    assert torch.equal(seen[0].tokens, (chosen == 1).any(1).nonzero().flatten())
    assert seen[0].count == len(hidden)


@pytest.mark.parametrize(("build", "layout"), [(qwen_moe, "split"), (gpt_oss, "interleaved")])
def test_neurons_of_experts_are_found_with_their_rows(build: Any, layout: str) -> None:
    model: PreTrainedModel = build()
    parameters = fused_parameters(model)
    assert len(parameters) == 4
    assert not list(neurons_of_experts(model))
    for name, owner in parameters.items():
        open_experts(owner, name.rpartition(".")[2])
    assert fused_parameters(model).keys() == parameters.keys()
    groups = list(neurons_of_experts(model))
    assert len(groups) == 8
    assert {group.producers[0].layout for group in groups} == {layout}
    for group in groups:
        reader, writer = (model.get_submodule(name) for name in group.names)
        assert group.neurons == writer.in_features == reader.out_features // 2
        assert group.names[0].replace("gate_up_proj", "down_proj") == group.consumer


def test_experts_without_a_gate_have_a_row_for_each_neuron() -> None:
    experts = fused("without a gate")
    open_experts(experts, "up_proj")
    assert not list(neurons_of_experts(experts))  # what writes is fused
    open_experts(experts, "down_proj")
    assert {group.producers[0].layout for group in neurons_of_experts(experts)} == {"rows"}


def test_neurons_that_share_rows_are_not_offered() -> None:
    experts = fused("split")
    experts._apply_gate = lambda made: made[..., :NEURONS] * made[..., NEURONS:].sum(-1, keepdim=True)
    for key in ("gate_up_proj", "down_proj"):
        open_experts(experts, key)
    assert not list(neurons_of_experts(experts))


def test_other_modules_are_no_experts() -> None:
    assert not any(is_experts(module) for module in llama().modules())
    with pytest.raises(ValueError, match="have no parameter 'up_proj'"):
        open_experts(fused("split"), "up_proj")
