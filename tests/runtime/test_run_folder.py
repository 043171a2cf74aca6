"""The folder of a run: what it keeps, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_by_block import REFINE, TEXT, WAYS, by_block
from support.model_state import assert_same_model
from support.models import llama

from reparam_peft.runtime.files import LOCK
from reparam_peft.runtime.run_folder import RunFolder


def test_what_is_finished_is_read_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"keep": 0.5})
    weight = torch.arange(6.0).reshape(2, 3)
    folder.finish({"block": "a", "after": 0.25}, {"A.weight": weight.t()})
    folder.finish({"block": "b", "after": 0.5}, {})
    with pytest.raises(ValueError, match="another run is under way in"):
        RunFolder(tmp_path / "run", {"keep": 0.5})
    folder.release()
    again = RunFolder(tmp_path / "run", {"keep": 0.5})
    assert again.finished == [{"block": "a", "after": 0.25}, {"block": "b", "after": 0.5}]
    assert torch.equal(again.tensors(0)["A.weight"], weight.t())
    assert again.tensors(1) == {}
    assert [json.loads(line)["block"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == ["a", "b"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        LOCK,
        "run.json",
        "log.jsonl",
        "block-0000.safetensors",
        "block-0001.safetensors",
    }


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(None, {})
    folder.finish({"block": "a"}, {"A": torch.ones(1)})
    assert folder.finished == [{"block": "a"}]
    assert folder.plan is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_block_is_computed_anew(tmp_path: Path) -> None:
    arguments = {**WAYS["both"], "run_folder": tmp_path}
    expected = by_block(llama(), TEXT, arguments)
    path = tmp_path / "block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert_same_model(by_block(llama(), TEXT, arguments), expected)
    (tmp_path / "block-0000.safetensors").unlink()
    assert_same_model(by_block(llama(), TEXT, arguments), expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"keep": 0.6}, "config"),
        ({"arguments": {"sequential": True}}, "refine"),
        ({"arguments": {"refine": REFINE}}, "sequential"),
        ({"batches": TEXT[:3]}, "batches"),
        ({"model": lambda: llama(vocab_size=101)}, "model"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    by_block(llama(), TEXT, {**WAYS["both"], "run_folder": tmp_path})
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {**changes.pop("arguments", WAYS["both"]), "run_folder": tmp_path}
    model, batches = changes.pop("model", llama)(), changes.pop("batches", TEXT)
    with pytest.raises(ValueError, match=f"holds a run with another `{what}`: .* Give another folder, or delete it"):
        by_block(model, batches, arguments, **changes)
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files and no run; give a new folder"):
        by_block(llama(), TEXT, {"sequential": True, "run_folder": tmp_path})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
