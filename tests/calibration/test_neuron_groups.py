"""Groups are found in models of many architectures, and each can give up neurons; what could not is not found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from support.architectures import ARCHITECTURES
from support.model_state import state_of
from support.models import Mixture, llama, mixture, token_inputs
from support.neurons import difference_when_cut
from torch import Tensor, nn

from reparam_peft import ReparamConfig
from reparam_peft.calibration.neuron_groups import find_groups, is_linear
from reparam_peft.layers.neuron_groups import NeuronGroup, Producer

ONE_OF_EACH = [
    *(
        "Llama, as wide as the model",
        "Phi3",
        "GPT-2",
        "OPT",
        "BERT, classifier",
        "MobileBERT, as wide as the model",
        "ModernBERT",
    ),
    *("XLNet", "T5, gated", "Whisper", "CLIP", "Qwen2-MoE", "Mixtral", "Mamba", "ALBERT", "ConvNeXt-V2"),
]


def groups_of(model: nn.Module, batch: dict[str, Any]) -> list[NeuronGroup]:
    return find_groups(model, {name: module for name, module in model.named_modules() if is_linear(module)}, batch)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_each_mlp_of_an_architecture_can_give_up_neurons(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    groups = groups_of(model, batch)
    assert len(groups) == architecture.mlps
    assert {producer.layout for group in groups for producer in group.producers} <= {architecture.layout}
    if groups:
        assert difference_when_cut(model, groups, batch) < 1e-5


def test_gate_and_up_are_one_group() -> None:
    group, _ = groups_of(llama(), token_inputs())
    mlp = "model.layers.0.mlp"
    assert group == NeuronGroup(
        (Producer(f"{mlp}.gate_proj", "rows"), Producer(f"{mlp}.up_proj", "rows")), f"{mlp}.down_proj", 160
    )
    assert set(group.names) == {f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"}


WIDTH, NEURONS = 8, 12
Between = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A linear layer, something between, and another."""

    def __init__(self, between: Between, rows: int = NEURONS) -> None:
        super().__init__()
        self.between = between
        self.first, self.gate, self.last = nn.Linear(WIDTH, rows), nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.norm, self.scale = nn.LayerNorm(NEURONS), nn.Parameter(torch.rand(NEURONS))
        self.to_width = torch.ones(NEURONS, WIDTH)
        self.extra: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.x, self.extra = x, 0.0
        return self.last(self.between(self, self.first(x))) + self.extra


def keeps(block: Block, h: Tensor) -> Tensor:
    """The hidden state is read a second time."""
    block.extra = h.sum(-1, keepdim=True)
    return h.relu()


def keeps_for_a_layer(block: Block, h: Tensor) -> Tensor:
    """The last layer runs for the hidden state a second time."""
    block.extra = block.last(h)
    return h.relu()


def refuses_large(h: Tensor) -> Tensor:
    if h.abs().max() > 1.5:
        raise ValueError("numbers are too large")
    return h


def half(h: Tensor) -> Tensor:
    return h[..., :NEURONS].relu() * h[..., NEURONS:]


REFUSED: dict[str, Between] = {
    "a norm": lambda block, h: block.norm(h),
    "a softmax": lambda block, h: h.softmax(-1),
    "a second reader": keeps,
    "a layer that runs twice": keeps_for_a_layer,
    "a scale of each channel": lambda block, h: h.relu() * block.scale,
    "a permutation": lambda block, h: h.relu().roll(1, -1),
    "pairs of neurons": lambda block, h: h.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * h,
    "heads": lambda block, h: h.unflatten(-1, (4, -1)).relu().flatten(-2),
    "a mean over channels": lambda block, h: h.relu() + h.mean(),
    "a width in the code": lambda block, h: h.relu().view(-1, NEURONS),
    "a factor of the width": lambda block, h: h.relu() / h.shape[-1],
    "other tokens": lambda block, h: h.cumsum(0),
    "a layer that is no target": lambda block, h: h * block.gate(block.x).sigmoid(),
    "something at random": lambda block, h: h * torch.rand_like(h),
    "few rows": lambda block, h: h[:1].relu(),
    "code that refuses other numbers": lambda block, h: refuses_large(h).relu(),
    "half of the rows": lambda block, h: torch.cat((h[..., :6].relu(), torch.ones_like(h[..., 6:])), -1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_give_up_neurons_is_not_found(what: str) -> None:
    torch.manual_seed(0)
    block = Block(REFUSED[what])
    targets: dict[str, nn.Module] = {"first": block.first, "last": block.last}
    assert find_groups(block, targets, {"x": torch.randn(6, WIDTH) / 10}) == []


FOUND: dict[str, tuple[Between, int, str]] = {
    "ReLU": (lambda block, h: h.relu(), NEURONS, "rows"),
    "in place": (lambda block, h: h.relu_(), NEURONS, "rows"),
    "identity": (lambda block, h: h, NEURONS, "rows"),
    "split": (lambda block, h: half(h), 2 * NEURONS, "split"),
    "split by the width": (lambda block, h: h.chunk(2, -1)[1].sigmoid() * h.chunk(2, -1)[0], 2 * NEURONS, "split"),
    "interleaved": (lambda block, h: h[..., ::2].relu() * h[..., 1::2].clamp(-1, 1), 2 * NEURONS, "interleaved"),
    "a factor of each token": (lambda block, h: h.relu() * block.x.mean(-1, keepdim=True), NEURONS, "rows"),
}


@pytest.mark.parametrize("what", [what for what in FOUND if what != "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_are_told_apart(what: str, dtype: torch.dtype) -> None:
    between, rows, layout = FOUND[what]
    torch.manual_seed(0)
    block = Block(between, rows).to(dtype)
    batch = {"x": torch.randn(6, WIDTH, dtype=dtype)}
    groups = groups_of(block, batch)
    assert groups == [NeuronGroup((Producer("first", layout),), "last", NEURONS)]
    if dtype == torch.float32:
        assert difference_when_cut(block, groups, batch) < 1e-5


def test_a_width_in_the_code_is_not_found_in_a_fused_layer() -> None:
    assert groups_of(Block(FOUND["split"][0], 2 * NEURONS), {"x": torch.randn(6, WIDTH)}) == []


class Chain(nn.Module):
    """Modules one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_what_offers_nothing_does_not_hide_the_others() -> None:
    torch.manual_seed(0)
    whats = ["a second reader", "code that refuses other numbers", "heads"]
    betweens = [FOUND["ReLU"][0], *(REFUSED[what] for what in whats), FOUND["ReLU"][0]]
    model = Chain(*(nn.Sequential(nn.LayerNorm(WIDTH), Block(between)) for between in betweens))
    with torch.no_grad():
        model.layers[2][1].first.weight.mul_(0.1)  # so that its numbers are not refused
    groups = groups_of(model, {"x": torch.randn(6, WIDTH)})
    assert [group.consumer for group in groups] == ["layers.0.1.last", "layers.4.1.last"]


def test_a_layer_of_a_chain_is_in_one_group_only() -> None:
    torch.manual_seed(0)
    groups = groups_of(Chain(*(nn.Linear(6, 6) for _ in range(6))), {"x": torch.randn(5, 6)})
    names = [f"layers.{index}" for index in range(6)]
    assert [(group.producers[0].name, group.consumer) for group in groups] == [*zip(names[::2], names[1::2], strict=True)]


def test_a_shared_parameter_is_not_offered() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    assert groups_of(model, token_inputs()) == []


def test_experts_that_tokens_reach_are_found() -> None:
    model = mixture()
    x = torch.randn(1, 9, 16)
    reached = model.router(x).argmax(-1).unique().tolist()
    groups = groups_of(model, {"x": x})
    assert [group.consumer for group in groups] == [f"experts.{index}.2" for index in reached]
    assert difference_when_cut(model, groups, {"x": x}) < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Mixture().train()
    model.experts.eval()
    model.requires_grad_(False)
    before, attributes = state_of(model), [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match=r"the model does not accept the batch \(\['x'\]\)"):
            groups_of(model, {"x": torch.ones(2, 3)})
    else:
        assert groups_of(model, {"x": torch.ones(2, 16)})
    assert state_of(model) == before
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_factorised_model_has_the_same_groups() -> None:
    model = llama()
    expected = groups_of(copy.deepcopy(model), token_inputs())
    wrapped = get_peft_model(model, ReparamConfig(target_modules=["gate_proj", "down_proj"], keep=0.6))
    prefix = "base_model.model."
    found = groups_of(wrapped, token_inputs())
    assert [group.consumer.removeprefix(prefix) for group in found] == [group.consumer for group in expected]
    assert found[0].producers[0].name == f"{prefix}model.layers.0.mlp.gate_proj"


def test_layers_that_are_offloaded_are_not_offered() -> None:
    model = llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert groups_of(model, token_inputs()) == []


@pytest.mark.parametrize("side", [slice(0, 30), slice(30, None)], ids=["right", "left"])
def test_padding_is_left_out_of_the_few_tokens(side: slice) -> None:
    ids = torch.arange(40)[None] % 90 + 5
    mask = torch.zeros_like(ids)
    mask[:, side] = 1
    assert len(groups_of(llama(), {"input_ids": ids, "attention_mask": mask})) == 2
