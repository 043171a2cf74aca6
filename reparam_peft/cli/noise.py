"""What a command shows of warnings and logs: those of this package, and of the libraries around it nothing below an error."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from ..arguments import ReparamWarning, listed
from .errors import CliError

OURS = __package__.partition(".")[0]  # the logger of this package, above those of its files
LEVELS = ("debug", "info", "warning", "error", "critical")  # words of transformers
VERBOSITY, OF_OTHERS = "REPARAM_VERBOSITY", "TRANSFORMERS_VERBOSITY"
LONGEST = 2000  # characters of a message, which may quote a file


class HostLogger(logging.Logger):
    """A logger that is made after `quieten`: of PyTorch, torchao, PEFT, … It tells of errors only.

    transformers' loggers follow their own verbosity, so that what they say can be collected where it explains an error.
    """

    def isEnabledFor(self, level: int) -> bool:
        speaks = level > logging.WARNING or self.name.partition(".")[0] in (OURS, "transformers")
        return speaks and super().isEnabledFor(level)


def quieten() -> None:
    """Set up a process that runs commands, before it imports PyTorch.

    Warnings of this package are shown once each, in one line; what it logs, from the level of REPARAM_VERBOSITY on. With
    TRANSFORMERS_VERBOSITY at warning or below, other libraries say what they say elsewhere.

    Raises:
        CliError: REPARAM_VERBOSITY is no level.
    """
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        """Not what is of another category, either, since some libraries let their own pass the filter again."""
        if issubclass(category, ReparamWarning) and str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {one_line(str(message))}", file=sys.stderr)

    _set_verbosity(os.environ.get(VERBOSITY) or "warning")
    if others_speak():
        return
    os.environ[OF_OTHERS] = "error"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ReparamWarning)
    warnings.showwarning = show
    logging.setLoggerClass(HostLogger)


@contextmanager
def others_silent() -> Iterator[None]:
    """Hold back what libraries say below an error while they are imported for a program that may not need them."""
    if others_speak():
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("always", category=ReparamWarning)
            yield
    finally:
        logging.disable(before)


def others_speak() -> bool:
    """Whether TRANSFORMERS_VERBOSITY asks for more than errors."""
    return os.environ.get(OF_OTHERS) in ("detail", "debug", "info", "warning")


def _set_verbosity(word: str) -> None:
    """Show what this package logs, from a level on."""
    if word not in LEVELS:
        raise CliError(f"{VERBOSITY} must be {listed(LEVELS)}, got {word!r}.")
    logger = logging.getLogger(OURS)
    logger.setLevel(word.upper())
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
    logger.propagate = False  # a library may give the root logger a handler


class _Lines(logging.Handler):
    """One line on stderr for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


class _Keeper(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def explained_errors() -> Iterator[None]:
    """Where what is done inside raises, show what transformers has warned of before, to which its messages refer.

    Its report on the tensors of a checkpoint is such a warning. Nothing of it is shown where all goes well.
    """
    from transformers import logging as of_transformers

    keeper = _Keeper()
    if others_speak():  # it is shown as it comes
        yield
        return
    before, done = of_transformers.get_verbosity(), False
    of_transformers.set_verbosity_warning()
    of_transformers.disable_default_handler()
    of_transformers.add_handler(keeper)
    try:
        yield
        done = True
    finally:
        for line in () if done else chain.from_iterable(record.getMessage().splitlines() for record in keeper.records):
            print(_printable(line), file=sys.stderr)
        of_transformers.remove_handler(keeper)
        of_transformers.enable_default_handler()
        of_transformers.set_verbosity(before)


def one_line(message: str) -> str:
    """A message, which may quote a file, in one line of characters that a terminal shows as they are."""
    plain = _printable(" ".join(message.split()))
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]} …"


def _printable(line: str) -> str:
    """A line without colours and other orders to a terminal."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).replace("\t", " ")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
