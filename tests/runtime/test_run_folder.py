"""The folder of a run: what it keeps, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.block_by_block import ALL, REFINE, TEXT, WAYS, by_block
from support.compressing import config_of
from support.model_state import assert_same_model
from support.models import llama

from reparam_peft import calibrate, plan
from reparam_peft.runtime.files import LOCK, lock_folder
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


@pytest.mark.parametrize("damage", ["number", "name", "shape", "missing", "entry", "no digest"])
def test_a_block_that_is_not_as_it_was_written_is_not_finished(damage: str, tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as folder:
        folder.finish({"block": "a"}, {"A": torch.ones(2, 3)})
        folder.finish({"block": "b"}, {"A": torch.ones(2, 3), "B": torch.ones(3)})
    path = tmp_path / "block-0001.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    if damage == "number":
        tensors["A"][0, 0] = torch.nan
    elif damage == "name":
        tensors["C"] = tensors.pop("A")
    elif damage == "shape":
        tensors["A"] = tensors["A"].flatten()
    elif damage == "missing":
        del tensors["A"]
    elif damage == "entry":
        metadata["entry"] = "[]"
    else:
        del metadata["sha256"]
    save_file(tensors, path, metadata)
    with RunFolder(tmp_path, {}) as folder:
        assert folder.finished == [{"block": "a"}]


def test_a_plan_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"keep": 0.5}) as folder:
        folder.begin({"ranks": [3]})
    with RunFolder(tmp_path, {"keep": 0.5}) as folder:
        assert folder.plan == tmp_path / "plan.json"
        folder.plan.write_text('{"ranks": [4]}')
        with pytest.raises(ValueError, match=r"plan\.json is not as the run wrote it\. Give another folder, or delete it\."):
            _ = folder.plan


def test_a_run_that_was_killed_before_its_plan_was_noted_plans_anew(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}):
        (tmp_path / "plan.json").write_text("{}")
    with RunFolder(tmp_path, {}) as folder:
        assert folder.plan is None


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    by_block(llama(), TEXT, {**WAYS["both"], "run_folder": folder})
    return folder


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"keep": 0.6}, "config"),
        ({"arguments": {"sequential": True}}, "refine"),
        ({"arguments": {"refine": REFINE}}, "sequential"),
        ({"batches": TEXT[:3]}, "batches"),
        ({"model": lambda: llama(vocab_size=101)}, "model"),
        ({"model": lambda: llama(rms_norm_eps=1e-3)}, "model's config"),
        ({"made": {"plan": plan}}, "plan"),
        ({"made": {"statistics": calibrate}}, "statistics"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes: dict[str, Any], what: str, finished_run: Path) -> None:
    files = {path: path.read_bytes() for path in finished_run.iterdir()}
    options = dict(changes)
    arguments = {**options.pop("arguments", WAYS["both"]), "run_folder": finished_run}
    for name, make in options.pop("made", {}).items():
        arguments[name] = make(llama(), config_of(**ALL), TEXT, progress=False)
    model, batches = options.pop("model", llama)(), options.pop("batches", TEXT)
    with pytest.raises(ValueError, match=f"holds a run with another `{what}`: .* Give another folder, or delete it"):
        by_block(model, batches, arguments, **options)
    assert files == {path: path.read_bytes() for path in finished_run.iterdir()}


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_folder_that_does_not_say_what_its_run_is_of_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json does not say what the run is of"):
        RunFolder(tmp_path, {"keep": 0.5})
    lock_folder(tmp_path).release()


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files and no run; give a new folder"):
        by_block(llama(), TEXT, {"sequential": True, "run_folder": tmp_path})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
