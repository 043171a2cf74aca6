"""What cannot be factorised: left dense with one warning where it was not named, else one error for all."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from reparam_peft import ReparamConfig

REASONS = {
    "attention.out_proj": "an nn.MultiheadAttention that is no plain one",
    "halved": "a Halved computes differently from Linear",
    "0": "the model keeps it in a list of Python, too",
    "tied, tied_too": r"the weight is shared \(tied.weight, tied_too.weight\)",
}


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Attention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Refusing(nn.Module):
    """One layer of each sort that cannot be factorised, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [nn.Linear(16, 16)]
        self.add_module("0", self.steps[0])
        self.attention = Attention(16, 2, batch_first=True)
        self.halved, self.plain = Halved(16, 16), nn.Linear(16, 16)
        self.tied, self.tied_too = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied_too.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        return self.tied_too(self.tied(self.plain(self.halved(self.steps[0](x)))))


def test_weights_that_are_split_among_processes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.placements = ()  # as of a DTensor
    with pytest.raises(ValueError, match=r"0: its weight is split among processes .* Load the base model whole"):
        get_peft_model(model, ReparamConfig(target_modules=["0"], r=2))


def test_all_linear_takes_what_it_can_and_lists_the_rest_once() -> None:
    model, x = Refusing().eval(), torch.randn(2, 3, 16)
    expected = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = get_peft_model(model, ReparamConfig(target_modules="all-linear", r="full")).eval()
    (told,) = [text for text in map(str, (w.message for w in caught)) if "cannot be factorised stay dense (5)" in text]
    assert all(name in told for name in ("attention.out_proj", "halved", "tied_too"))
    assert list(small.peft_config["default"].rank_pattern) == ["plain"]
    torch.testing.assert_close(small(x), expected)


def test_names_that_are_given_raise_all_at_once() -> None:
    with pytest.raises(ValueError, match="5 of the targets cannot be factorised") as raised:
        get_peft_model(Refusing(), ReparamConfig(target_modules=["0", "halved", "tied", "tied_too", "attention.out_proj"]))
    for names, reason in REASONS.items():
        assert names in str(raised.value)
        with pytest.raises((TypeError, ValueError), match=reason):
            get_peft_model(Refusing(), ReparamConfig(target_modules=names.split(", ")))


def test_where_nothing_is_left_all_linear_raises() -> None:
    with pytest.raises(TypeError, match="0: a Halved computes differently"):
        get_peft_model(nn.Sequential(Halved(16, 16)), ReparamConfig(target_modules="all-linear"))


def test_the_base_of_tied_weights_may_stay() -> None:
    small = get_peft_model(Refusing(), ReparamConfig(target_modules=["tied", "tied_too"], keep_base=True))
    assert len(small.peft_config["default"].rank_pattern) == 2
