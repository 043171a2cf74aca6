"""The file of statistics: one that an earlier version wrote is read, and what is written is laid out as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reparam_peft import Statistics

TENSORS = {
    "grams/q": torch.eye(3, dtype=torch.float64) * 6,
    "grams/embed": torch.tensor([2.0, 3.0], dtype=torch.float64),
    "sums/q": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    "sums/embed": torch.tensor([2.0, 3.0], dtype=torch.float64),
    "weighted_grams/q": torch.eye(3, dtype=torch.float64),
    "weighted_sums/q": torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64),
    **{f"output_grams/{name}": torch.eye(2, dtype=torch.float64) * 4 for name in ("q", "k")},
    **{f"energies/{name}": torch.tensor([9.0, 8.0], dtype=torch.float64) for name in ("q", "k")},
}
FIELDS: dict[str, Any] = {
    "inputs": {"q": "q", "k": "q", "embed": "embed"},
    "rows": {"q": 4, "embed": 5},
    "weights": {"q": 0.25},
    "gradient_rows": {"q": 2, "k": 2},
    "predictions": {"q": 7, "k": 7},
    "weight_norms": {"q": 1.5, "k": 2.5, "embed": 3.5},
    "seed": 11,
}
METADATA = {"format": "reparam_peft statistics 1", "statistics": json.dumps(FIELDS)}


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "old.safetensors", metadata=METADATA)
    got = Statistics.load(tmp_path / "old.safetensors")
    assert got.reads == FIELDS["inputs"]
    assert (got.input_rows("k"), got.input_rows("embed"), got.output_rows("k")) == (4, 5, 2)
    assert (got.tokens, got.gradient_tokens, got.seed) == (5, 7, 11)
    assert torch.equal(got.gram("k"), TENSORS["grams/q"] / 4)
    assert torch.equal(got.mean("embed"), TENSORS["sums/embed"] / 5)
    assert torch.equal(got.weighted_gram("k"), TENSORS["weighted_grams/q"] / 0.25)
    assert got.weighted_gram("embed") is None
    assert torch.equal(got.fisher("k"), TENSORS["output_grams/k"] / 2)
    assert got.loss_scale("q") == 9 / (8 * 8 / 2) * 2 / 7
    assert got.weight_norms == FIELDS["weight_norms"]


def test_what_is_read_is_written_as_it_was(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "old.safetensors", metadata=METADATA)
    Statistics.load(tmp_path / "old.safetensors").save(tmp_path / "new.safetensors")
    tensors, metadata = contents(tmp_path / "new.safetensors")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in tensors.items())
