"""Activations that are kept, in memory or on disk, until they are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from reparam_peft.blockwise import activations
from reparam_peft.blockwise.activations import Activations
from reparam_peft.runtime.files import clear_litter


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
    assert not list(tmp_path.rglob("*activations*"))


def test_what_a_block_gives_twice_is_kept_twice(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    with Activations(tmp_path) as store:
        store.put(("a", 0), (whole, whole, whole[1:]))
        assert all(map(torch.equal, store.get(("a", 0)), (whole, whole, whole[1:])))


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(activations, "save_file", full)
    with Activations(tmp_path) as store, pytest.raises(OSError, match=r"a-0\.safetensors cannot be written .No space left"):
        store.put(("a", 0), torch.ones(2))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file cannot be written"):
        Activations(tmp_path / "file")


def test_what_a_killed_run_has_left_goes_and_what_another_works_with_stays(tmp_path: Path) -> None:
    killed, alive = Activations(tmp_path), Activations(tmp_path)
    for store in (killed, alive):
        store.put(("a", 0), torch.ones(2))
    assert killed.scratch is not None
    assert alive.scratch is not None
    killed.scratch.lock.release()
    clear_litter(tmp_path, idle=0)
    assert list(tmp_path.iterdir()) == [alive.scratch.folder]
    assert torch.equal(alive.get(("a", 0)), torch.ones(2))
