"""The command line: `reparam compress`, `plan`, `search`, `heal`, `evaluate`, `report`, `export` and `run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

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
from .noise import one_line, others_silent, quieten
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

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            quieten()
            _register()
            command(*args, **kwargs)

        app.command(cls=Command, epilog=_epilog(*examples))(spread(run))
        return command

    return add


def _epilog(*examples: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"- `reparam {example}`" for example in examples)


def _register() -> None:
    from ..registration import register

    register()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("reparam_peft"))
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


@app.command(
    context_settings={"allow_interspersed_args": False},  # what stands after PROGRAM is its own, `--help` too
    epilog=_epilog(
        "run lm_eval --model hf --model_args pretrained=standalone --tasks hellaswag",
        "run transformers serve standalone",
        "run train.py --epochs 3",
    ),
)
def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A Python script, an installed command or a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="Of PROGRAM.")] = None,
) -> None:
    """Run another program with `reparam_peft` imported, so that its PEFT and transformers load compressed models."""
    from .run import run_program

    run_program(program, arguments or [], before=others_silent()(_register))


def main() -> None:
    """Entry point: errors in one line on stderr, exit code 1; wrong usage exits with 2; REPARAM_DEBUG=1 shows tracebacks."""
    try:
        app()
    except (*EXPECTED, *FAULTS) as error:
        if os.environ.get("REPARAM_DEBUG"):
            raise
        name = type(error).__name__
        _tell(str(error) or name if isinstance(error, EXPECTED) else f"{name}: {error}")


EXPECTED = (CliError, ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, SafetensorError)
# Of a library or of ours, which a file of a stranger may bring about.
FAULTS = (LookupError, AttributeError, AssertionError, MemoryError, NameError, EOFError, BufferError)


def _tell(message: str) -> NoReturn:
    """One line on stderr, and exit code 1."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)
