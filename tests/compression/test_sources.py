"""What goes along with a compressed checkpoint: files of its source, and nothing from elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reparam_peft.compression.sources import copy_files, files_beside_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, a file of the user's beside it, and in it much that is not to travel."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in (
        "config.json",
        "model.safetensors",
        "README.md",
        "code.py",
        ".env",
        "weights.bin",
        "tokenizer.json",
        "sub/x.txt",
    ):
        (source / name).write_text(name)
    (tmp_path / "id_rsa").write_text("PRIVATE")
    return source


def names(folder: Path) -> set[str]:
    return {str(path) for path in files_beside_weights(folder)}


def test_weights_code_and_hidden_files_stay(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert names(folder) == {"tokenizer.json", "sub/x.txt"}
    assert not recwarn.list


@pytest.mark.parametrize("target", ["../id_rsa", "../nothing", "notes.txt", "..", "/etc"])
def test_links_that_lead_out_are_left_out(target: str, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").symlink_to(target)
    (folder / "inside.txt").symlink_to("tokenizer.json")
    with pytest.warns(UserWarning, match=r"not copied: notes\.txt\. Put"):
        files = files_beside_weights(folder)
    copy_files(folder, files, tmp_path / "out")
    copied = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name: path.read_text() for path in copied} == {
        "tokenizer.json": "tokenizer.json",
        "inside.txt": "tokenizer.json",
        "x.txt": "sub/x.txt",
    }
    assert not any(path.is_symlink() for path in copied)


def test_files_of_the_hub_cache_are_links_into_its_blobs(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text("vocabulary")
    (snapshot / "vocab.txt").symlink_to("../../blobs/1234")
    assert names(snapshot) == {"vocab.txt"}
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "vocab.txt").symlink_to("../../../blobs/1234")
    assert names(snapshot / "sub") == {"vocab.txt"}
    assert not recwarn.list


def test_modules_in_folders_keep_their_configs(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert "1_Pooling/config.json" in names(folder)


def test_a_named_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ValueError, match=r"generation_config\.json is neither a file nor a folder"):
        files_beside_weights(folder)


def test_what_names_code_does_not_travel(folder: Path, tmp_path: Path) -> None:
    kept = {"model_max_length": 10**30, "tokenizer_class": "A"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**kept, "auto_map": {"AutoTokenizer": ["other/repository--x.A", None]}})
    )
    (folder / "broken_config.json").write_text("[" * 100_000)
    copy_files(folder, files_beside_weights(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == kept
