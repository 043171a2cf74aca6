"""Activations that are kept, in memory or on disk, until they are dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reparam_peft.blockwise.activations import Activations


@pytest.mark.parametrize("on_disk", [False, True])
def test_activations_are_kept_until_they_are_dropped(on_disk: bool, tmp_path: Path) -> None:
    tree = (torch.arange(6.0).view(2, 3), {"mask": torch.tensor([True]), "none": None, "half": torch.ones(2).bfloat16()})
    with Activations(tmp_path / "off" if on_disk else None) as store:
        store.put(("a", 0), tree)
        assert len(list(tmp_path.rglob("*.safetensors"))) == on_disk
        for _ in range(2):  # what is taken out may be changed
            first, rest = store.get(("a", 0))
            assert torch.equal(first, tree[0])
            assert rest["none"] is None
            assert torch.equal(rest["mask"], tree[1]["mask"])
            assert rest["half"].dtype == torch.bfloat16
            first.zero_()
        store.drop(("a", 0))
        store.drop(("never there",))
        assert not list(tmp_path.rglob("*.safetensors"))
        with pytest.raises(KeyError):
            store.get(("a", 0))
        store.put(("b", 1), tree)
    assert not list(tmp_path.rglob("activations-*"))
