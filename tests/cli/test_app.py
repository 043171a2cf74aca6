"""`reparam` itself: usage, help, exit codes, and models that no command takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.command_line import Run, assert_error

from reparam_peft.cli import app as cli
from reparam_peft.cli import inputs as sources


@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_refuses_what_is_no_model(run: Run, models: Path, tmp_path: Path, command: str) -> None:
    def call(model: object) -> SimpleNamespace:
        return run(command, model, *([tmp_path / "out"] if command == "compress" else []))

    assert_error(call(models / "text.txt"), "text.txt is a file; MODEL must be a folder, a Hub id or `demo`")
    assert_error(call("nobody/no-such-model"), "nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    assert_error(call(tmp_path / "empty"), "empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_damaged_and_incomplete_folders(run: Run, models: Path, tmp_path: Path, command: str) -> None:
    output = [tmp_path / "out"] if command == "compress" else []
    for name, damage in {
        "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
        "without weights": lambda folder: (folder / "model.safetensors").unlink(),
        "no JSON": lambda folder: (folder / "config.json").write_text("{"),
        "unknown architecture": lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
    }.items():
        folder = shutil.copytree(models / "llama", tmp_path / name)
        damage(folder)
        assert_error(run(command, folder, *output), "error: .")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "model"],
        ["compress", "model", "out", "--keep", "much"],
        ["compress", "model", "out", "--length", "1"],
        ["compress", "model", "out", "--windows", "0"],
        ["compress", "model", "out", "--ratio", "0.5"],
        ["compress", "model", "out", "--calibration-windows", "0"],
        ["compress", "model", "out", "--seed", "-1"],
        ["plan"],
        ["plan", "model", "--no-evaluate"],
        ["evaluate"],
        ["distil", "model"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Usage: ")
    assert "Error" in result.err
    assert "Traceback" not in result.err


def test_help_lists_commands_and_options(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in ("compress", "plan", "evaluate"):
        assert command in result.out
    for option in ("--keep", "--rank", "--target-modules", "--calibration", "--statistics", "--plan", "--json", "--overwrite"):
        assert option in run("compress", "--help").out


def test_a_traceback_on_request(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPARAM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["reparam", "evaluate", str(models / "text.txt")])
    with pytest.raises(sources.CliError, match="is a file"):
        cli.main()


def test_the_installed_command(models: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("reparam"), "compress", models / "bert", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch("error: .+\n", done.stderr), "nothing else, either, of what libraries say when they are imported"
