"""Fingerprints of batches and models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reparam_peft.runtime.fingerprints import fingerprint_of_batches, fingerprint_of_model


def test_fingerprints_tell_values_names_dtypes_and_order_apart() -> None:
    def batches(*values: torch.Tensor, name: str = "input_ids") -> list[dict[str, Any]]:
        return [{name: value, "use_cache": False} for value in values]

    one, two = torch.arange(4).reshape(1, 4), torch.ones(1, 4, dtype=torch.long)
    known = [
        batches(one, two),
        batches(two, one),
        batches(one),
        batches(one.int(), two.int()),
        batches(one.reshape(2, 2), two),
        batches(one, two, name="labels"),
    ]
    assert len({fingerprint_of_batches(batch) for batch in known}) == len(known)
    assert fingerprint_of_batches(batches(one.clone(), two.clone())) == fingerprint_of_batches(known[0])
    layers = [nn.Linear(2, 2), nn.Linear(2, 2).half(), nn.Sequential(nn.Linear(2, 2))]
    layers[2][0].load_state_dict(layers[0].state_dict())
    assert len({fingerprint_of_model(layer) for layer in layers}) == 3
