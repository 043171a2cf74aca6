"""Several adapters at once: each adds what it changes."""

from __future__ import annotations

import torch

from reparam_peft.tuner.combining import combined


def test_one_product_is_itself_and_the_base_is_not_computed() -> None:
    product = torch.ones(2)
    assert combined([product], lambda: 1 / 0) is product  # type: ignore[arg-type, return-value]


def test_changes_are_added_up() -> None:
    base = torch.tensor([1.0, 2.0])
    assert torch.equal(combined([base + 1, base + 2, base], lambda: base), base + 3)
