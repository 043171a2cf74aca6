"""Which models' blocks can be run one by one, with statistics that are those of passes over the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.batches import pairs, text
from support.gathering import linear_layers
from support.models import gpt2, llama, t5
from torch import Tensor, nn

from reparam_peft.blockwise import courses
from reparam_peft.blockwise.courses import course_of
from reparam_peft.runtime.blocks import find_blocks

TEXTS = [text([9, 5], 9), text([9, 9, 3], 9, seed=1)]


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_kept_is_foreseen(build: Callable[[], nn.Module], gradients: bool) -> None:
    model = build()
    found = course_of(model, find_blocks(model), TEXTS, linear_layers(model).values(), gradients)
    assert found is not None
    course, size = found
    assert len(course.replay.order) == 2
    width = model.config.hidden_size
    assert size == 4 * width * 5 * 9 * 2 * (2 if gradients else 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Tapped(nn.Module):
    """The result has what a block reads, too, in it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.blocks[0](x)
        return self.blocks[1](first), first


class Reading(nn.Module):
    """Blocks that all read what the first layer makes, and of which one may be random."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.random = random
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.blocks[0](x) + self.blocks[1](x + torch.randn_like(x) if self.random else x)


@pytest.mark.parametrize("case", ["an encoder's output", "a common input", "the result", "random"])
def test_where_they_would_be_others_there_is_none(case: str) -> None:
    model = t5() if case.startswith("an") else Tapped() if case == "the result" else Reading(case == "random")
    batches: Any = [pairs([8, 3], [6, 2], (8, 6))] if case.startswith("an") else [{"x": Tensor(4, 8).normal_()}]
    modules = linear_layers(model).values()
    assert course_of(model, find_blocks(model), batches, modules, True) is None
    of_inputs = course_of(model, find_blocks(model), batches, modules, False)
    assert (of_inputs is None) == (case == "random"), "without gradients nothing is weighed by them"


class Leaving(nn.Module):
    """The first of these blocks leaves something for the later ones: in an attribute, or in an object that it gets."""

    def __init__(self, is_given: bool) -> None:
        super().__init__()
        self.is_given, self.left = is_given, SimpleNamespace()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        for block in self.blocks:
            block.forward = partial(self.block, block)  # type: ignore[method-assign]

    def block(self, block: nn.ModuleDict, x: Tensor, place: Any = None) -> Tensor:
        place = self.left if place is None else place
        place.sum = getattr(place, "sum", 0 * x) + block["a"](x) if self.is_given or block is self.blocks[0] else place.sum
        return torch.tanh(x + block["b"](place.sum))

    def forward(self, x: Tensor) -> Tensor:
        place = SimpleNamespace() if self.is_given else None
        for block in self.blocks:
            x = block(x, place)
        return x


class Told(nn.Module):
    """The result has a part in it that a block has left in an attribute, as losses of routers may be."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.blocks[0][1].register_forward_hook(lambda module, args, output: setattr(self, "left", output.mean()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.left


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("build", [lambda: Leaving(True), lambda: Leaving(False), Told])
def test_blocks_that_leave_something_elsewhere_than_in_their_outputs_have_none(
    build: Callable[[], nn.Module], gradients: bool
) -> None:
    torch.manual_seed(0)
    model = build()
    batches = [{"x": torch.randn(3, 8)}]
    assert course_of(model, find_blocks(model), batches, linear_layers(model).values(), gradients) is None


def test_processes_that_reach_different_blocks_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(courses, "alike_in_every_process", found.append)
    model = llama()
    assert course_of(model, find_blocks(model), TEXTS, linear_layers(model).values(), True) is None
    assert found == [(["model.layers.0", "model.layers.1"], [])]


def test_what_the_model_does_not_accept_is_left_to_be_told_later() -> None:
    model = llama()
    assert course_of(model, find_blocks(model), [{"x": Tensor(2, 2)}], [], True) is None
