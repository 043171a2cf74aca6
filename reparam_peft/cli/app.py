"""The command line: `reparam compress`, `plan`, `search`, `heal`, `evaluate`, `report` and `export`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from ..arguments import ReparamWarning
from .compress import compress
from .errors import CliError
from .evaluate import evaluate
from .export import export
from .groups import spread
from .heal import heal
from .plan import plan
from .report import report
from .search import search
from .settings_file import Command

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress pretrained transformers by low-rank reparameterisation.",
)


def _add(command: Callable[..., None], *examples: str) -> None:
    """Make a function a command: with options for its groups of options, with `--config`, and with examples in its help."""
    epilog = "Examples:\n\n" + "\n\n".join(f"- `reparam {example}`" for example in examples)
    app.command(cls=Command, epilog=epilog)(spread(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("reparam_peft"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")] = False,
) -> None:
    """Options of `reparam` itself."""


_add(
    compress,
    "compress demo compressed --keep 0.9",
    "compress MODEL OUT --calibration train.txt --text test.txt --sequential --refine --run-folder blocks",
    "compress --config settings.yaml --seed 1",
)
_add(
    plan,
    "plan demo --keep 0.8 --statistics demo.safetensors --output plan.json",
    "plan MODEL --config settings.yaml --json",
)
_add(evaluate, "evaluate compressed --text article.txt --json", "evaluate compressed --speed --config settings.yaml")
_add(search, "search demo compressed --max-increase 5%", "search --config settings.yaml --run-folder trials")
_add(
    heal,
    "heal compressed healed --calibration article.txt --steps 200",
    "heal --config settings.yaml --run-folder steps",
)
_add(report, "report compressed", "report compressed --no-measure --output page", "report --config settings.yaml")
_add(
    export,
    "export compressed standalone",
    "export compressed small --quantize int8",
    "export --config settings.yaml --overwrite",
)


def _showing() -> Callable[..., None]:
    """What prints a warning in one line, once: a command that calibrates, plans and compresses gives some at each step."""
    shown: set[str] = set()

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        line = _one_line(str(message))
        if line not in shown:
            print(f"warning: {line}", file=sys.stderr)
        shown.add(line)

    return show


def main() -> None:
    """Entry point: errors in one line on stderr, exit code 1; wrong usage exits with 2; REPARAM_DEBUG=1 shows tracebacks."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ReparamWarning)  # those of other libraries are not shown
    warnings.showwarning = _showing()
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
