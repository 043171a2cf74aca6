"""`reparam run`: another program of Python, in a process that has imported this package."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Any, NoReturn

from .errors import CliError


def run_program(program: str, arguments: Sequence[str], before: Callable[[], None]) -> None:
    """Run a program as `python PROGRAM`, `PROGRAM` or `python -m PROGRAM` does, in this process, and exit as it does.

    Args:
        program: a file, else a command that is installed in this environment, else a module.
        arguments: of the program.
        before: called before anything of the program is imported, once it is known to be there.

    Raises:
        CliError: it is none of these.
    """
    start = _start_of(program)
    before()
    sys.argv[:] = [program, *arguments]
    with ExitStack() as stack:
        stack.push(_as_python_does)
        start()


def _start_of(program: str) -> Callable[[], Any]:
    """What runs a program, which is yet to be imported; `sys.path` begins then with what Python lets it begin with."""
    if os.path.isfile(program):
        sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
        return partial(runpy.run_path, program, run_name="__main__")
    for command in entry_points(group="console_scripts", name=program):
        return partial(_call, command)
    sys.path.insert(0, os.getcwd())
    if _is_module(program):
        return partial(runpy.run_module, program, run_name="__main__", alter_sys=True)
    raise CliError(f"{program} is no file, no command that is installed in this environment, and no module.")


def _call(command: EntryPoint) -> NoReturn:
    sys.exit(command.load()())


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # there is no package that it could be in; or it is no name
        return False


def _as_python_does(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
    """A traceback and exit code 1: errors of the program are not told as those of `reparam`."""
    if kind is not None and error is not None and isinstance(error, Exception):
        sys.excepthook(kind, error, trace)
        sys.exit(1)
    return False
