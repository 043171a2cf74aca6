"""Statistics of groups wait on disk, so that nothing is gathered twice, and are gathered again where they cannot."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.compressing import TEXT, compressed
from support.model_state import assert_same_model
from support.models import llama

from reparam_peft import Statistics
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.compression.waiting import psutil, waiting
from reparam_peft.runtime import files

GROUPS = [["a"], ["b", "c"]]


def mounted(fstype: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(mountpoint=folder, fstype=fstype) for folder in ("/", tempfile.gettempdir())]


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted("ext4"))


def test_those_of_the_last_group_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gathered: list[str] = []

    def gather() -> Statistics:
        gathered.append("")
        return Statistics(seed=len(gathered))

    with waiting(GROUPS, 10) as keep:
        assert keep is not None
        seeds = [keep(group, gather).seed for group in [*GROUPS, *GROUPS]]
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert seeds == [1, 2, 1, 3]
    assert not list(tmp_path.iterdir())


def test_without_room_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(19))
    with waiting(GROUPS, 10) as keep:
        assert keep is None


@pytest.mark.parametrize("fstype", ["tmpfs", "ext4"])
def test_nothing_waits_in_memory(fstype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted(fstype))
    with waiting(GROUPS, 10) as keep:
        assert (keep is None) == (fstype == "tmpfs")


@pytest.mark.parametrize(("owner", "name"), [(tempfile, "gettempdir"), (files, "unfinished")])
def test_without_a_folder_nothing_waits(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(owner, name, fails)
    with waiting(GROUPS, 10) as keep:
        assert keep is None


def test_statistics_that_are_damaged_as_they_wait_are_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gathered = iter(range(1, 9))

    def seed() -> int:
        return keep(GROUPS[0], lambda: Statistics(seed=next(gathered))).seed

    with waiting(GROUPS, 10) as keep:
        assert keep is not None
        assert seed() == 1
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-9])
        assert [seed(), seed()] == [2, 2]


def test_statistics_that_cannot_be_written_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Statistics, "save", fails)
    gathered = iter(range(1, 9))
    with waiting(GROUPS, 10) as keep:
        assert keep is not None
        assert [keep(GROUPS[0], lambda: Statistics(seed=next(gathered))).seed for _ in range(2)] == [1, 2]


def test_the_same_factors_and_one_pass_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = BlockwiseGatherer.gather, list[int]()

    def gather(self: object, model: object, modules: dict[str, object], *args: object, **options: object) -> Statistics:
        sizes.append(len(modules))
        return real(self, model, modules, *args, **options)

    options = {"target_modules": "all-linear", "keep": 0.4}
    whole = compressed(llama(), TEXT, **options)
    monkeypatch.setattr(BlockwiseGatherer, "gather", gather)
    parts = compressed(llama(), TEXT, arguments={"max_memory": 400_000}, **options)
    assert len(sizes) > 1
    assert sum(sizes) == len(whole.peft_config["default"].rank_pattern) + len(whole.peft_config["default"].dense_modules)
    assert_same_model(parts, whole, tolerance=1e-5)
