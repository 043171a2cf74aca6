"""Batches are split by rows."""

from __future__ import annotations

import torch

from reparam_peft.runtime.batches import split_rows


def test_batches_are_split_by_rows_where_their_tensors_agree() -> None:
    batch = {"a": torch.arange(6).view(3, 2), "b": torch.arange(3), "c": torch.tensor(1.0), "d": "text"}
    parts = split_rows(batch, 2)
    assert [part["a"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert [part["b"].tolist() for part in parts] == [[0, 1], [2]]
    assert all(part["c"] == 1 and part["d"] == "text" for part in parts)
    other = {"a": torch.ones(3), "pixels": torch.ones(7, 2)}
    assert split_rows(other, 1) == [other]
