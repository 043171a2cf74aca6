"""Folders that the command line writes: replaced on request only, and whole or as they were."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from support.command_line import DATA_FREE, Run, assert_error, calibrated
from support.models import llama
from transformers import PreTrainedTokenizerBase

from reparam_peft import ReparamConfig
from reparam_peft.cli.errors import CliError
from reparam_peft.cli.outputs import check_output, note_evaluation, save_whole


def test_an_existing_folder_is_replaced_only_on_request(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: nothing to lose
    arguments = ["compress", models / "llama", output, *DATA_FREE]
    assert run(*arguments, "--rank", 4).code == 0
    (output / "mine.txt").write_text("mine")
    assert_error(run(*arguments, "--rank", 8), "out already exists; choose another folder or add --overwrite")
    assert (output / "mine.txt").exists()
    assert set(json.loads((output / "adapter_config.json").read_text())["rank_pattern"].values()) == {4}
    assert_error(run(*arguments, "--rank", 8, "--overwrite"), r"holds no compressed model but other files \(mine.txt\)")
    (output / "mine.txt").unlink()
    assert run(*arguments, "--rank", 8, "--overwrite").code == 0
    assert set(json.loads((output / "adapter_config.json").read_text())["rank_pattern"].values()) == {8}
    file = tmp_path / "file"
    file.write_text("mine")
    assert_error(run("compress", models / "llama", file, "--no-evaluate"), "file already exists")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("inside", [False, True])
def test_never_overwrites_the_model_that_it_compresses(run: Run, models: Path, tmp_path: Path, inside: bool) -> None:
    model = shutil.copytree(models / "llama", tmp_path / "folder" / "llama")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = run("compress", model, model.parent if inside else model, "--no-evaluate", "--overwrite")
    assert_error(result, "overwrite")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_replaces_only_an_earlier_result(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compress", models / "llama"]
    output = tmp_path / "out"
    for _ in range(2):
        assert run(*arguments, output, *DATA_FREE, "--overwrite").code == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    assert_error(run(*arguments, precious, "--overwrite"), "holds no compressed model but other files")
    assert_error(run(*arguments, precious / "thesis.txt", "--overwrite"), "is a file; OUT must be a folder")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    for place in (".", "..", "../.."):
        assert_error(run(*arguments, place, "--overwrite"), "is or holds the current folder")
    assert (precious / "thesis.txt").read_text() == "years"
    assert (output / "adapter_config.json").exists()


def test_a_failure_while_writing_leaves_what_was_there(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = ["compress", models / "llama", output, *DATA_FREE]

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        assert_error(run(*arguments), "No space left on device")
        assert list(tmp_path.iterdir()) == []
        output.mkdir()
        (output / "adapter_config.json").write_text('{"peft_type": "REPARAM"}')
        assert_error(run(*arguments, "--overwrite"), "No space left on device")
        (output / "mine.txt").write_text("mine")
        assert_error(run(*arguments, "--overwrite"), r"other files \(mine.txt\), which are not overwritten")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "mine.txt").read_text() == "mine"
    assert (output / "adapter_config.json").read_text() == '{"peft_type": "REPARAM"}'


def test_what_the_command_is_given_stays_in_out(run: Run, models: Path, tmp_path: Path) -> None:
    output, blocks = tmp_path / "out", tmp_path / "out" / "blocks"
    arguments = ["compress", models / "llama", output, *calibrated(models), "--sequential", "--run-folder", blocks]
    assert run(*arguments).code == 0
    assert (blocks / "run.json").exists()
    assert (output / "adapter_config.json").exists()
    statistics = output / "statistics.safetensors"
    arguments = ["compress", models / "llama", output, *calibrated(models), "--statistics", statistics]
    assert_error(run(*arguments, "--overwrite"), r"other files \(blocks\)")
    shutil.rmtree(blocks)
    assert run(*arguments, "--overwrite").code == 0
    before = statistics.read_bytes()
    arguments = [argument for argument in arguments if argument not in ("--calibration", models / "calibration.txt")]
    assert run(*arguments, "--overwrite").code == 0
    assert statistics.read_bytes() == before
    assert_error(run("compress", models / "llama", output, "--overwrite", "--statistics", output), "is OUT and .* as well")


def test_another_adapter_is_not_ours_to_replace(run: Run, models: Path, tmp_path: Path) -> None:
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path / "lora"))
    assert_error(run("compress", models / "llama", tmp_path / "lora", *DATA_FREE, "--overwrite"), "holds no compressed model")


def test_names_with_brackets_are_printed_as_they_are(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "[bold]out[/] :smile:"
    assert f"saved to {output}" in run("compress", models / "llama", output, *DATA_FREE).out


def test_figures_that_are_not_finite_are_not_saved_with_the_model() -> None:
    small = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], keep=0.5))
    assert note_evaluation(small, {"a": 1.0, "b": math.inf}) == {"a": 1.0, "b": math.inf}
    assert small.peft_config["default"].evaluation == {"a": 1.0}


class Saved:
    """Stands for a model or a tokenizer: writes one small file."""

    def __init__(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        self.name, self.before = name, before

    def save_pretrained(self, folder: Path) -> None:
        self.before()
        (Path(folder) / self.name).write_text('{"peft_type": "REPARAM"}')


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("beside", [False, True], ids=["whole", "beside what stays"])
def test_an_earlier_result_comes_back(
    beside: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, stays = tmp_path / "out", tmp_path / "out" / "blocks"
    output.mkdir()
    (output / "adapter_config.json").write_text('{"peft_type": "REPARAM", "of": "before"}')
    if beside:
        stays.mkdir()
    rename, calls = Path.rename, []

    def fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(type(error)):
        save_whole(Saved("adapter_config.json"), Saved("tokenizer.json"), output, stays, overwrite=True)
    assert "before" in (output / "adapter_config.json").read_text()
    assert stays.exists() == beside
    assert not (output / "tokenizer.json").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_run_has_moved_away_is_put_back(tmp_path: Path) -> None:
    moved = tmp_path / ".out.0123456789abcdef.earlier" / "whole"
    moved.mkdir(parents=True)
    (moved / "adapter_config.json").write_text('{"peft_type": "REPARAM"}')
    with pytest.raises(CliError, match="already exists"):
        check_output(tmp_path / "out", "", False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "adapter_config.json"]


def test_an_out_that_appears_meanwhile_stays_and_the_result_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def appears() -> None:
        output.mkdir()
        (output / "thesis.txt").write_text("years")

    with pytest.raises(CliError, match=r"already exists.* The result is in .*out-1"):
        save_whole(Saved("adapter_config.json"), Saved("tokenizer.json", appears), output, overwrite=False)
    assert (output / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in (tmp_path / "out-1").iterdir()) == ["adapter_config.json", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1"]


def test_permissions_follow_the_umask(run: Run, models: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run("compress", models / "llama", tmp_path / "out", *DATA_FREE).code == 0
        get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
    assert set(modes.values()) == {0o640}


def test_out_inside_of_the_model_is_refused(run: Run, models: Path) -> None:
    assert_error(run("compress", models / "llama", models / "llama" / "small", *DATA_FREE), "is inside of the model's folder")
    assert not (models / "llama" / "small").exists()
