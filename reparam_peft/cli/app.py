"""The command line: `reparam compress`, `plan`, `search`, `heal`, `evaluate`, `report` and `export`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from ..arguments import ReparamWarning
from .command_options import (
    CompressOptions,
    EvaluateOptions,
    ExportOptions,
    HealOptions,
    PlanOptions,
    ReportOptions,
    SearchOptions,
)
from .errors import CliError
from .groups import spread
from .settings_file import Command

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress pretrained transformers by low-rank reparameterisation.",
)


def _command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: with options for its groups of options, with `--config`, and with examples in its help.

    What a command does is imported by its function, after PEFT knows the method: help is shown without the seconds that takes.
    """
    epilog = "Examples:\n\n" + "\n\n".join(f"- `reparam {example}`" for example in examples)

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            from ..registration import register

            register()
            command(*args, **kwargs)

        app.command(cls=Command, epilog=epilog)(spread(run))
        return command

    return add


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")] = False,
) -> None:
    """Options of `reparam` itself."""


@_command(
    "compress demo compressed --keep 0.9",
    "compress MODEL OUT --calibration train.txt --text test.txt --sequential --refine --run-folder blocks",
    "compress --config settings.yaml --seed 1",
)
def compress(options: CompressOptions) -> None:
    """Compress MODEL, save it to OUT, load it again, and say how large and how good it is."""
    from .compress import compress

    compress(options)


@_command(
    "plan demo --keep 0.8 --statistics demo.safetensors --output plan.json",
    "plan MODEL --config settings.yaml --json",
)
def plan(options: PlanOptions) -> None:
    """Print which rank each matrix of MODEL would get, what it stores and what it is predicted to cost; change nothing."""
    from .plan import plan

    plan(options)


@_command(
    "evaluate compressed --text article.txt --json",
    "evaluate compressed --speed --config settings.yaml",
)
def evaluate(options: EvaluateOptions) -> None:
    """Perplexity of MODEL on a text, its size, and on request its speed."""
    from .evaluate import evaluate

    evaluate(options)


@_command(
    "search demo compressed --max-increase 5%",
    "search --config settings.yaml --run-folder trials",
)
def search(options: SearchOptions) -> None:
    """Find the smallest compressed MODEL whose metric gets no worse than allowed, and save it to OUT."""
    from .search import search

    search(options)


@_command(
    "heal compressed healed --calibration article.txt --steps 200",
    "heal --config settings.yaml --run-folder steps",
)
def heal(options: HealOptions) -> None:
    """Train the compressed MODEL to predict what the dense one predicts, and save it to OUT."""
    from .heal import heal

    heal(options)


@_command(
    "report compressed",
    "report compressed --no-measure --output page",
    "report --config settings.yaml",
)
def report(options: ReportOptions) -> None:
    """Write a report on RUN: one HTML file that needs no network, its pictures as PNG, and its data as JSON."""
    from .report import report

    report(options)


@_command(
    "export compressed standalone",
    "export compressed small --quantize int8",
    "export --config settings.yaml --overwrite",
)
def export(options: ExportOptions) -> None:
    """Write the compressed MODEL to OUT as a checkpoint that `AutoModel…` loads without the dense one, or as ONNX files."""
    from .export import export

    export(options)


def _show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    """A warning of this package, in one line; those of other libraries are not shown."""
    print(f"warning: {_one_line(str(message))}", file=sys.stderr)


def main() -> None:
    """Entry point: errors in one line on stderr, exit code 1; wrong usage exits with 2; REPARAM_DEBUG=1 shows tracebacks."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ReparamWarning)
    warnings.showwarning = _show
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("REPARAM_DEBUG"):
        app()
    try:
        app()
    except EXPECTED as error:
        _tell(str(error) or type(error).__name__)
    except FAULTS as error:  # of a library or of ours, which a file of a stranger may bring about
        _tell(f"{type(error).__name__}: {error}")


EXPECTED = (CliError, ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, SafetensorError)
FAULTS = (LookupError, AttributeError, AssertionError, MemoryError, NameError, EOFError, BufferError)
LONGEST = 2000  # characters of a message, which may quote a file


def _tell(message: str) -> NoReturn:
    """One line on stderr, and exit code 1."""
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(1)


def _one_line(message: str) -> str:
    """A message, which may quote a file, in one line of characters that a terminal shows as they are."""
    line = " ".join(message.split())
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]} …"
