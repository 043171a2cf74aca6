"""Options that several commands have, one by one and in groups (see `groups.spread`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import listed
from ..defaults import CALIBRATED, KEEP, LENGTH, WINDOWS
from ..numerics.methods import METHODS, names_of_methods
from .errors import CliError

if TYPE_CHECKING:  # help is shown without PyTorch and PEFT
    from ..config.reparam_config import ReparamConfig

SHARE = 0.5  # of the windows that a model writes itself, beside a text that is given

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model or of a compressed adapter, or `demo`.")
]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the compressed adapter to.")]
SmallerOption = Annotated[
    float | None,
    typer.Option("--keep", help="Load an adapter at this smaller size, where its file serves several. Default: whole."),
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Seed of the text that the model writes, of sampled labels, and of the order in --refine. Default: 0.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded."""

    dtype: Annotated[str, typer.Option(help="Dtype to load the model in: auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str | None, typer.Option(help="Device, e.g. cpu or cuda. Default: the best there is.")] = None


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What perplexity is measured on."""

    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure perplexity on: a file, or a Hub data set as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. "
            "Default: Python's language reference."
        ),
    ] = None
    length: LengthOption = LENGTH
    windows: Annotated[int, typer.Option(min=1, help="The most windows of text to evaluate.")] = 8


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What is compressed."""

    target_modules: Annotated[
        str, typer.Option(help="`all-linear`, a regular expression, or name endings separated by commas.")
    ] = "all-linear"
    exclude_modules: Annotated[
        str | None, typer.Option(help="Modules to leave out: a regular expression, or name endings separated by commas.")
    ] = None
    experts: Annotated[
        bool | None,
        typer.Option(
            "--experts/--no-experts", help="Whether fused experts of a mixture are compressed, too. Default: where there are."
        ),
    ] = None
    unreached: Annotated[
        str | None,
        typer.Option(
            help="What becomes of targets that no calibration text reaches: `dense`, they are left out with a warning, or "
            "`error`. Default: dense with `--target-modules all-linear`, else error."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How what is stored is shared out among matrices, and in which form."""

    allocation: Annotated[
        str | None,
        typer.Option(
            help=f"uniform or loss. Default: loss; uniform with --rank or {listed(names_of_methods(needs_data=False))}."
        ),
    ] = None
    form: Annotated[
        str | None,
        typer.Option(
            help="factors, pivot, or corrected: matrices in few bits with a correction of --rank. Default: pivot; factors "
            "without calibration; with --budget bytes whichever is best for a matrix."
        ),
    ] = None
    ceiling: Annotated[
        float | None,
        typer.Option(
            help="The most to store of a matrix, as a fraction. Below 1, with --form factors, the adapter also loads at "
            "smaller sizes. Default: 1."
        ),
    ] = None
    neurons: Annotated[
        bool | None,
        typer.Option(
            "--neurons/--no-neurons",
            help="Whether MLPs may lose neurons, with --allocation loss. Default: where it costs less than ranks.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What the budget is of, and which widths numbers may have."""

    budget: Annotated[
        str | None,
        typer.Option(
            help="What --keep is a fraction of: parameters; bytes, for which each matrix gets its form, its rank and the bits "
            "of its numbers; flops, multiply-adds; or latency, time that is measured here. Default: parameters."
        ),
    ] = None
    bits: Annotated[
        str | None,
        typer.Option(
            help="Widths that numbers may have with --budget bytes or --form corrected, separated by commas: 16 (the dtype of "
            "the model), 8 (needs torchao) and 4 (needs bitsandbytes). Default: all."
        ),
    ] = None

    def widths(self) -> tuple[int, ...] | None:
        """The widths; None: all.

        Raises:
            CliError: --bits holds no whole numbers.
        """
        if self.bits is None:
            return None
        words = [word.strip() for word in self.bits.split(",")]
        if not all(word.isdecimal() for word in words):
            raise CliError(f"--bits must be whole numbers separated by commas, such as 8,4, got {self.bits!r}.")
        return tuple(map(int, words))


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """What a `ReparamConfig` is made of."""

    keep: Annotated[
        float | None, typer.Option(help=f"Fraction of the targeted parameters, or bytes, to store. Default: {KEEP}.")
    ] = None
    rank: Annotated[str | None, typer.Option(help="One rank for all matrices, or `full`; instead of --keep.")] = None
    budget: BudgetOptions
    targets: TargetOptions
    method: Annotated[str | None, typer.Option(help=f"{listed(METHODS)}. Default: {CALIBRATED['method']}.")] = None
    storage: StorageOptions

    def config(self) -> ReparamConfig:
        """The config, its values checked.

        Raises:
            CliError, TypeError, ValueError: a value is wrong, or excludes another.
        """
        from ..config.reparam_config import ReparamConfig

        if self.keep is not None and self.rank is not None:
            raise CliError("--keep and --rank exclude each other; give one.")
        if self.rank is not None and self.rank != "full" and not self.rank.isdecimal():
            raise CliError(f"--rank must be a positive whole number or `full`, got {self.rank!r}.")
        excluded = self.targets.exclude_modules
        words: dict[str, Any] = {  # which the config checks
            "r": int(self.rank) if self.rank is not None and self.rank != "full" else self.rank,
            "method": self.method,
            "allocation": self.storage.allocation,
            "form": self.storage.form,
            "budget": self.budget.budget,
            "bits": self.budget.widths(),
            "unreached": self.targets.unreached,
        }
        return ReparamConfig(
            **words,
            target_modules=_names(self.targets.target_modules),
            exclude_modules=None if excluded is None else _names(excluded),
            keep=KEEP if self.keep is None else self.keep,
            ceiling=self.storage.ceiling,
            neurons=self.storage.neurons,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What is calibrated on."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: as for --text. Default: text that the model writes itself, which takes a decoder."
        ),
    ] = None
    self_written: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Part of the windows to calibrate on that the model writes itself. Default: all of them; with --calibration "
            f"{SHARE:g}, or none where the model cannot.",
        ),
    ] = None
    calibration_windows: Annotated[
        int | None,
        typer.Option(min=1, help=f"The most windows to calibrate on. Default: {WINDOWS}; {2 * WINDOWS} with --calibration."),
    ] = None
    statistics: Annotated[
        Path | None, typer.Option(help="File of calibration statistics: read if it exists, else written; serves any --keep.")
    ] = None


def _names(value: str) -> str | list[str]:
    """Name endings where the value is a list of words, else a regular expression (or `all-linear`)."""
    words = value.split(",")
    plain = all(word.strip().replace("_", "").replace(".", "").isalnum() for word in words)
    return [word.strip() for word in words] if plain and value != "all-linear" else value
