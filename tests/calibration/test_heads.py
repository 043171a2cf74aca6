"""Logits that are held back: the same statistics, whatever a model makes of them, and none where nobody wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import text
from support.gathering import assert_same, gather, linear_layers
from support.models import llama
from torch import Tensor, nn

from reparam_peft.calibration.heads import HeldBack
from reparam_peft.calibration.statistics import Statistics

BATCHES = [text([9, 5], 9), text([7, 1, 3], 7, seed=1)]


class Capped(nn.Module):
    """A model that bounds its logits, as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.get_output_embeddings = self.inner.get_output_embeddings

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        return {"logits": 3 * torch.tanh(self.inner(**batch).logits / 3)}


def below_the_head(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in linear_layers(model).items() if "head" not in name}


def calls_of_heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the logits that are computed from now on."""
    shapes: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        if len(weight) == 100:  # words
            shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(nn.functional, "linear", counted)
    return shapes


@pytest.mark.parametrize("build", [llama, Capped])
def test_statistics_are_those_of_whole_logits(build: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    got = gather(build(), below_the_head, BATCHES)
    monkeypatch.setattr(HeldBack, "of", lambda *arguments: None)
    expected: Statistics = gather(build(), below_the_head, BATCHES)
    assert_same(got, expected, tolerance=1e-5)
    assert got.gradient_tokens == expected.gradient_tokens


def test_logits_are_computed_for_positions_that_count_and_for_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = calls_of_heads(monkeypatch)
    gather(llama(), below_the_head, BATCHES, gradients=False)
    assert not shapes
    gather(llama(), below_the_head, BATCHES)
    assert shapes == [(14, 100), (11, 100)]


def test_a_head_that_others_watch_computes_as_ever() -> None:
    model = llama()
    head = model.get_output_embeddings()
    assert HeldBack.of(model, ()) is not None
    assert HeldBack.of(model, [head]) is None
    with head.register_forward_hook(lambda *arguments: None):
        assert HeldBack.of(model, ()) is None
    assert HeldBack.of(nn.Linear(2, 2), ()) is None
    assert HeldBack.of(model.model, ()) is None
