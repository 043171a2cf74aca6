"""What each command takes: its arguments and options, in the order of its help.

Help and completion are made of this file, which must stay light to import: neither PyTorch nor PEFT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..defaults import CALIBRATED, EPOCHS, LENGTH
from .errors import CliError
from .options import (
    CalibrationOptions,
    ConfigOptions,
    JsonOption,
    LengthOption,
    LoadOptions,
    ModelArgument,
    OutputArgument,
    OverwriteOption,
    SeedOption,
    SmallerOption,
    StorageOptions,
    TargetOptions,
    TextOptions,
)


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Compression block by block."""

    sequential: Annotated[
        bool, typer.Option("--sequential", help="Block by block: fit each matrix to what the earlier ones became.")
    ] = False
    refine: Annotated[
        bool, typer.Option("--refine", help="Block by block: train each block to compute what the original one does.")
    ] = False
    epochs: Annotated[int | None, typer.Option(min=1, help=f"Of --refine. Default: {EPOCHS}.")] = None
    run_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what is finished (statistics, plan and products, or blocks, and checkpoints of --heal): a run "
            "that was killed goes on from there."
        ),
    ] = None
    offload_folder: Annotated[
        Path | None, typer.Option(help="Folder for activations during --sequential or --refine. Default: in memory.")
    ] = None

    @property
    def by_block(self) -> bool:
        """Whether the model is compressed block by block."""
        return self.sequential or self.refine


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """The arguments and options of `reparam compress`, in the order of its help."""

    model: ModelArgument
    output: OutputArgument
    config: ConfigOptions
    calibration: CalibrationOptions
    plan: Annotated[Path | None, typer.Option(help="Plan that `reparam plan --output` wrote, instead of --keep.")] = None
    seed: SeedOption = None
    blocks: BlockOptions
    heal: Annotated[
        str | None,
        typer.Option(
            help="Then train the whole model for this long, such as 90s, 30m or 1h, to predict what the dense one predicts, on "
            "later windows of the calibration text; without --calibration, on text that it writes itself."
        ),
    ] = None
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after, and generate a sample.")] = True
    text: TextOptions
    load: LoadOptions
    overwrite: OverwriteOption = False
    as_json: JsonOption = False

    @property
    def beside(self) -> tuple[Path | str | None, ...]:
        """Files and folders that are read or written, but for MODEL and OUT."""
        blocks, calibration = self.blocks, self.calibration
        written = (blocks.run_folder, blocks.offload_folder, calibration.statistics)
        return (*written, self.plan, calibration.calibration, self.text.text)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The arguments and options of `reparam plan`, in the order of its help."""

    model: ModelArgument
    config: ConfigOptions
    calibration: CalibrationOptions
    seed: SeedOption = None
    length: LengthOption = LENGTH
    load: LoadOptions
    output: Annotated[Path | None, typer.Option(help="File to write the plan to, for `reparam compress --plan`.")] = None
    as_json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The arguments and options of `reparam evaluate`, in the order of its help."""

    model: ModelArgument
    keep: SmallerOption = None
    text: TextOptions
    speed: Annotated[bool, typer.Option(help="Also measure latency and peak memory.")] = False
    load: LoadOptions
    as_json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What is searched for."""

    max_increase: Annotated[
        str, typer.Option(help="How much worse the metric may get: a percentage, or a number in its own unit.")
    ] = "5%"
    metric: Annotated[
        str,
        typer.Option(
            help="perplexity or accuracy of next tokens on --text, a task of lm-evaluation-harness, or a file of one."
        ),
    ] = "perplexity"
    documents: Annotated[int | None, typer.Option(min=1, help="The most documents of a task. Default: all.")] = None
    methods: Annotated[str, typer.Option(help="Methods to try, separated by commas.")] = CALIBRATED["method"]
    max_trials: Annotated[int, typer.Option(min=1, help="The most trials of each method.")] = 10


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The arguments and options of `reparam search`, in the order of its help."""

    model: ModelArgument
    output: OutputArgument
    wanted: GoalOptions
    targets: TargetOptions
    storage: StorageOptions
    calibration: CalibrationOptions
    seed: SeedOption = None
    run_folder: Annotated[Path | None, typer.Option(help="Folder for trials: a search that was killed goes on.")] = None
    text: TextOptions
    load: LoadOptions
    overwrite: OverwriteOption = False
    as_json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained."""

    train_windows: Annotated[int, typer.Option(min=1, help="The most windows of text to train on.")] = 512
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over them. Default: 1.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of --epochs.")] = None
    time: Annotated[
        str | None, typer.Option(help="How long to train, such as 90s, 30m or 1h, instead of --epochs and --steps.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 1
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 5e-5
    distillation: Annotated[float, typer.Option(help="Part of the loss that is distillation; the rest is of the text.")] = 1.0
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, where the device has it.")] = False
    run_folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints: a run that was killed goes on from the last one.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the windows.")] = 0

    def minutes(self) -> float | None:
        """How long to train; None: as many epochs or steps as are asked for.

        Raises:
            CliError: what --time says is no time, or --epochs or --steps say otherwise.
        """
        if self.time is not None and not (self.epochs is None and self.steps is None):
            raise CliError("--time says how long to train; leave out --epochs and --steps.")
        return None if self.time is None else minutes_of("--time", self.time)


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """The arguments and options of `reparam heal`, in the order of its help."""

    model: ModelArgument
    output: OutputArgument
    keep: SmallerOption = None
    teacher: Annotated[str | None, typer.Option(help="The dense model. Default: the one that MODEL was made from.")] = None
    calibration: Annotated[
        str | None, typer.Option(help="Text to train on: as for --text. Default: Python's language reference.")
    ] = None
    training: TrainingOptions
    text: TextOptions
    load: LoadOptions
    overwrite: OverwriteOption = False
    as_json: JsonOption = False


def minutes_of(option: str, time: str) -> float:
    """A time such as 90s, 30m or 1h in minutes.

    Raises:
        CliError: it is none.

    >>> minutes_of("--heal", "90s"), minutes_of("--heal", "1.5h")
    (1.5, 90.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", time.strip())
    minutes = 0.0 if match is None else float(match[1]) * {"s": 1 / 60, "m": 1.0, "h": 60.0}[match[2]]
    if not minutes:
        raise CliError(f"{option} must be a time above zero in s, m or h, such as 90s, 30m or 1h, got {time!r}.")
    return minutes


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The arguments and options of `reparam report`, in the order of its help."""

    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that a command wrote an adapter to, or the run folder of `compress`.")
    ]
    output: Annotated[Path | None, typer.Option(help="Folder to write the report to. Default: RUN/report.")] = None
    measure: Annotated[
        bool, typer.Option(help="Load both models: for speed, samples, angles between layers, and perplexity if not known.")
    ] = True
    dense: Annotated[str | None, typer.Option(help="The dense model. Default: the one that RUN was made from.")] = None
    text: TextOptions
    load: LoadOptions
    as_json: JsonOption = False


class Kind(str, Enum):
    """What can be exported."""

    standalone = "standalone"
    dense = "dense"
    onnx = "onnx"


class Bits(str, Enum):
    """How factors are stored."""

    int8 = "int8"
    int4 = "int4"


class TableBits(str, Enum):
    """How tables of embeddings are stored."""

    int8 = "int8"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments and options of `reparam export`, in the order of its help."""

    model: ModelArgument
    output: OutputArgument
    keep: SmallerOption = None
    to: Annotated[
        Kind, typer.Option(help="With factors, to load after `import reparam_peft`; dense, of the old size; or ONNX files.")
    ] = Kind.standalone
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="With the code that it needs, for `trust_remote_code=True`.")
    ] = False
    quantize: Annotated[Bits | None, typer.Option(help="Factors in 8 bits (needs torchao) or 4 bits (needs bitsandbytes).")] = (
        None
    )
    quantize_tables: Annotated[
        TableBits | None, typer.Option(help="Tables of embeddings that are not factorised in 8 bits (needs torchao).")
    ] = None
    statistics: Annotated[
        Path | None, typer.Option(help="File that `compress --statistics` wrote, with which --quantize loses much less.")
    ] = None
    load: LoadOptions
    overwrite: OverwriteOption = False
    as_json: JsonOption = False
