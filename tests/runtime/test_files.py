"""Files and folders are whole or not there, and one process works in a folder at a time."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reparam_peft.runtime import files
from reparam_peft.runtime.files import (
    LOCK,
    Scratch,
    clear_litter,
    is_ours,
    lock_folder,
    remove_whole,
    replacing,
    save_tensors,
    unfinished,
    write_whole,
    writing,
)


class Killed(BaseException):
    """A process that ends, as far as the code below it is concerned: clean-up is patched away with it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def save(path: Path, text: str, then: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(text)
        then()


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for content in ("one\n", "two: ÄÖ\n"):
        write_whole(path, content)
        assert path.read_text(encoding="utf-8") == content
    write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"


@pytest.mark.parametrize("phase", ["save", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(
    phase: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "first")

    def fail(*_: Any) -> None:
        raise error

    if phase != "save":
        monkeypatch.setattr(files.os, phase, fail)
    with pytest.raises(type(error), match="plan" if isinstance(error, OSError) else "^$"):
        save(path, "second", fail if phase == "save" else print)
    assert path.read_text() == "first"
    assert entries(tmp_path) == {"plan.json"}


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "authorized_keys", tmp_path / "index.html"
    victim.write_text("mine")
    path.symlink_to(victim)
    write_whole(path, "new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("mine", "new", False)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "plan.json", "{}")
        with replacing(tmp_path / "factors") as aside:
            save_file({"A": torch.ones(2)}, aside)
        folder = unfinished(tmp_path / "run")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plan.json", "factors", folder.name)]
    assert modes == [0o666 & ~mask, 0o666 & ~mask, 0o777 & ~mask]


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f'key "{i}" é\n\\\x7f\u2028': f"value {i} 😀" for i in range(8)}
    tensors = {"a/é": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(1, dtype=torch.int32)}
    for number in range(6):
        save_tensors(tmp_path / str(number), tensors, dict(list(metadata.items())[number:] + list(metadata.items())[:number]))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(6)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write_whole(path, "long")
    assert path.read_text() == "long"


def test_a_kill_leaves_the_earlier_file_and_litter_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "first")
    with monkeypatch.context() as patches:
        patches.setattr(files.shutil, "rmtree", kill)
        patches.setattr(files.os, "replace", kill)
        with pytest.raises(Killed):
            write_whole(path, "second")
    (litter,) = entries(tmp_path) - {"plan.json"}
    foreign = {".plan.json.unfinished", ".notes.0123456789abcdef.tmp", "thesis.0123456789abcdef.unfinished"}
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / ".link.0123456789abcdef.unfinished").symlink_to(tmp_path / "plan.json")
    clear_litter(tmp_path)
    assert litter in entries(tmp_path), "another process may still be at work"
    lock = lock_folder(tmp_path / litter)
    clear_litter(tmp_path, idle=0)
    assert litter in entries(tmp_path), "another process is at work"
    lock.release()
    clear_litter(tmp_path, idle=0)
    assert entries(tmp_path) == {"plan.json", ".link.0123456789abcdef.unfinished", *foreign}
    assert path.read_text() == "first"


def test_old_litter_goes_with_the_next_file(tmp_path: Path) -> None:
    litter = unfinished(tmp_path / "plan.json")
    (litter / "plan.json").write_text("half")
    for part in (litter / "plan.json", litter):
        os.utime(part, (0, 0))
    files._clear_once.cache_clear()  # as in another process
    write_whole(tmp_path / "log.jsonl", "")
    assert entries(tmp_path) == {"log.jsonl"}


def test_a_folder_is_removed_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with monkeypatch.context() as patches:
        patches.setattr(files.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            remove_whole(folder)
    assert not folder.exists()
    clear_litter(tmp_path, idle=0)
    assert entries(tmp_path) == set()
    with pytest.raises(OSError, match="run cannot be written"):
        remove_whole(folder)
    assert entries(tmp_path) == set()


def test_one_run_works_in_a_folder_at_a_time(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=f"under way in {tmp_path}, .* give another folder"):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()
    (tmp_path / LOCK).unlink(missing_ok=True)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        lock_folder(tmp_path)
    assert victim.read_text() == "mine"


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    reading, telling = os.pipe()
    if (child := os.fork()) == 0:
        lock = lock_folder(tmp_path)
        os.write(telling, b"x")
        time.sleep(20)  # until it is killed
        lock.release()
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(ValueError, match="under way"):
        lock_folder(tmp_path)
    os.kill(child, 9)
    os.waitpid(child, 0)
    lock_folder(tmp_path).release()


def test_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="results"), writing(tmp_path / "results"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="another"), writing(tmp_path / "results"):
        raise ValueError("another")
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="results"):
        write_whole(tmp_path / "results", "")


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name} is no file that can be replaced"):
            write_whole(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_scratch_folder_is_the_user_s_alone_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks")

    with Scratch(tmp_path, "scratch") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert is_ours(folder)
        clear_litter(tmp_path, idle=0)
        assert folder.exists(), "it is in use"
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(files, "lock_folder", no_locks)
        with pytest.raises(OSError, match="no locks"):
            Scratch(tmp_path, "scratch")
    assert not list(tmp_path.iterdir())
    killed = Scratch(tmp_path, "scratch")
    killed.lock.release()
    clear_litter(tmp_path, idle=0)
    assert not killed.folder.exists()
