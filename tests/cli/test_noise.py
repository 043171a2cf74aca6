"""What a command shows: warnings and logs of this package, errors of others, and what explains an error."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import DATA_FREE, Run, assert_error, quick

from reparam_peft.arguments import ReparamWarning
from reparam_peft.cli import app as cli
from reparam_peft.cli.noise import others_silent, quieten


@pytest.fixture
def shown(run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], str]:
    """What is on stderr of a command that calls a function; `run` puts back what it sets."""

    def call(function: Callable[[], None]) -> str:
        monkeypatch.setattr(cli, "app", lambda: (quieten(), function()))
        cli.main()
        return capfd.readouterr().err

    return call


def test_own_warnings_are_shown_in_one_line_and_once_and_those_of_others_are_not(shown: Callable[..., str]) -> None:
    def warns() -> None:
        warnings.simplefilter("default", FutureWarning)  # as some libraries do
        for kind in (UserWarning, FutureWarning):
            warnings.warn("of another library", kind, stacklevel=1)
        for _ in range(2):
            warnings.warn("the base model\nis [another] one", ReparamWarning, stacklevel=1)

    assert shown(warns) == "warning: the base model is [another] one\n"


def speak(name: str) -> Callable[[], None]:
    """A function that logs with a logger which is made when it is called, as those of libraries are."""

    def logs() -> None:
        for logger in (logging.getLogger(f"reparam_peft.{name}"), logging.getLogger(f"library.{name}")):
            for level in ("info", "warning", "error"):
                getattr(logger, level)("%s\nof %s", level, logger.name.partition(".")[0])

    return logs


def test_own_records_are_shown_and_errors_only_of_others(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def logged(name: str) -> tuple[list[str], list[str]]:
        """What is shown of this package, and levels of what reaches the handlers of others."""
        caplog.clear()
        return shown(speak(name)).splitlines(), [record.levelname for record in caplog.records]

    own = ["warning: warning of reparam_peft", "error: error of reparam_peft"]
    assert logged("a") == (own, ["ERROR"])
    monkeypatch.setenv("REPARAM_VERBOSITY", "info")
    assert logged("b") == (["info: info of reparam_peft", *own], ["ERROR"])
    monkeypatch.setenv("REPARAM_VERBOSITY", "error")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    logging.setLoggerClass(logging.Logger)
    assert logged("c") == (own[1:], ["WARNING", "ERROR"])


def test_others_are_silent_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("library.d")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with others_silent():
            logger.warning("held back")
            warnings.warn("held back", UserWarning, stacklevel=1)
        logger.warning("told")
        warnings.warn("told", UserWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == [str(item.message) for item in caught] == ["told"]


def test_a_verbosity_that_is_none_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPARAM_VERBOSITY", "loud")
    assert_error(run("plan", "a"), "REPARAM_VERBOSITY must be debug, info, warning, error or critical, got 'loud'")


def test_what_is_compressed_in_name_only_is_told(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", tmp_path / "out", *DATA_FREE, "--keep", 1)
    assert result.code == 0
    assert "warning: All 14 targets stay dense: at this size factors would be no smaller. Lower `r` or `keep`.\n" in result.err


def test_the_report_that_an_error_refers_to_is_shown_above_it(run: Run, models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8 * config["intermediate_size"]}))
    result = run("evaluate", folder, *quick(models))
    assert_error(result, "other cannot be loaded: .*above report")
    assert "MISMATCH" in result.err.partition("error: ")[0]
    assert "MISMATCH" not in run("evaluate", models / "llama", *quick(models)).err


def test_tensors_that_a_checkpoint_lacks_are_told(run: Run, models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("evaluate", folder, *quick(models))
    assert result.code == 0
    assert "warning: 1 tensors are not in the files of " in result.err
    assert "random numbers now, the first 'model.norm.weight'" in result.err
