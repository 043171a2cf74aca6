"""`reparam run`: a script, a command or a module runs with its own arguments, output, errors and exit code."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.command_line import Run, assert_error

from reparam_peft.cli import run as of_programs

PROGRAM = """
import sys
from peft import PeftType

def main():
    assert "REPARAM" in PeftType.__members__
    print(__name__, *sys.argv[1:])
    if "fail" in sys.argv:
        raise ValueError("of the program")
    return 3

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the program as a module; what a run sets for the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "small_program.py").write_text(PROGRAM, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["script", "command", "module"])
def test_programs_run_as_without_it(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    command = EntryPoint("small-program", "small_program:main", "console_scripts")
    monkeypatch.setattr(of_programs, "entry_points", lambda group, name: [command] * (name == command.name))
    if name == "command":
        monkeypatch.syspath_prepend(folder)
    program = {"script": folder / "small_program.py", "command": "small-program", "module": "small_program"}[name]
    result = run("run", program, "--help", "-x", "a b", "--version")
    assert (result.code, result.out) == (3, f"{'small_program' if name == 'command' else '__main__'} --help -x a b --version\n")
    failed = run("run", program, "fail")
    assert failed.code == 1
    assert "Traceback" in failed.err
    assert failed.err.endswith("ValueError: of the program\n")


@pytest.mark.parametrize("program", ["nowhere", "nowhere.py", "no.where", "./no/where", ""])
def test_what_is_not_there_is_told(run: Run, folder: Path, program: str) -> None:
    assert_error(run("run", program, "--help"), "is no file, no command that is installed in this environment, and no module")
