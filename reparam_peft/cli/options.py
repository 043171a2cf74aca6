"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model or of a compressed adapter, or `demo`.")
]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="Text to measure perplexity on: a file, or a Hub data set as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. "
        "Default: Python's language reference."
    ),
]
KeepOption = Annotated[float | None, typer.Option(help="Fraction of the targeted parameters to store. Default: 0.8.")]
RankOption = Annotated[str | None, typer.Option(help="One rank for all matrices, or `full`; instead of --keep.")]
TargetOption = Annotated[str, typer.Option(help="`all-linear`, a regular expression, or name endings separated by commas.")]
ExcludeOption = Annotated[str | None, typer.Option(help="Likewise, to leave out.")]
MethodOption = Annotated[str | None, typer.Option(help="svd, whitened or autoencoder. Default: whitened.")]
AllocationOption = Annotated[str | None, typer.Option(help="uniform or loss. Default: loss; uniform with --rank or svd.")]
FormOption = Annotated[str | None, typer.Option(help="factors or pivot. Default: pivot; factors without calibration.")]
CeilingOption = Annotated[
    float | None,
    typer.Option(
        help="The most to store of a matrix, as a fraction. Below 1, with --form factors, the adapter also loads at smaller "
        "sizes. Default: 1."
    ),
]
SmallerOption = Annotated[
    float | None,
    typer.Option("--keep", help="Load an adapter at this smaller size, where its file serves several. Default: whole."),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: as for --text. Default: Python's language reference, of which --text then takes "
        "later windows."
    ),
]
CalibrationWindowsOption = Annotated[int, typer.Option(min=1, help="The most windows of text to calibrate on.")]
StatisticsOption = Annotated[
    Path | None, typer.Option(help="File of calibration statistics: read if it exists, else written; serves any --keep.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Seed of the labels sampled for gradients, and of the order in --refine. Default: 0.")
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="The most windows of text to evaluate.")]
DtypeOption = Annotated[str, typer.Option(help="Dtype to load the model in: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device, e.g. cpu or cuda. Default: the best there is.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the compressed adapter to.")]
