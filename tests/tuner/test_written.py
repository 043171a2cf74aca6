"""Weights that a model writes to as it runs: left dense where they were not named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from reparam_peft import ReparamConfig
from reparam_peft.tuner.written import written_modules


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out.weight.data.zero_()  # when it is made, which does not count

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.gate.weight.data.clamp_(-0.1, 0.1)
        return self.gate(x) + self.out(x).sigmoid_()


class Rescaled(nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(16, 16)
        self.init_weights()

    def init_weights(self) -> None:
        self.head.weight.data.uniform_(-0.1, 0.1)

    @torch.no_grad()
    def rescale(self) -> None:
        for block in self.blocks:
            block.out.weight.div_(2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_they_are_seen_in_the_code_of_methods() -> None:
    assert written_modules(Rescaled()) == {f"blocks.{i}.{name}" for i in range(2) for name in ("gate", "out")}
    assert written_modules(Mixer()) == {"gate"}


def test_all_linear_leaves_them_dense() -> None:
    with pytest.warns(match=r"\(4\):\n.*blocks.*the model writes to its weight as it runs"):
        small = get_peft_model(Rescaled(), ReparamConfig(target_modules="all-linear", keep=0.5))
    assert [matrix.name for matrix in small.size_report().matrices] == ["head"]
    small.train()(torch.randn(2, 16)).sum().backward()


def test_one_that_is_named_is_taken() -> None:
    small = get_peft_model(Rescaled(), ReparamConfig(target_modules=["gate"], keep=0.5)).eval()
    assert len(small.size_report().matrices) == 2
    assert small(torch.randn(2, 16)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"blocks.0.gate: its weight is the product"):
        small.train()(torch.randn(2, 16))
