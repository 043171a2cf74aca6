"""`reparam search`: the smallest model that is good enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..report.record import Record, saving_with
from ..searching.result import SearchResult
from ..searching.search import check_search
from ..searching.search import search as search_model
from .errors import CliError
from .inputs import calibrated, calibration_batches, config_of, load_dense, read_batches, read_statistics
from .options import (
    AllocationOption,
    CalibrationOption,
    CalibrationWindowsOption,
    CeilingOption,
    DeviceOption,
    DtypeOption,
    ExcludeOption,
    FormOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutputArgument,
    OverwriteOption,
    SeedOption,
    StatisticsOption,
    TargetOption,
    TextOption,
    WindowsOption,
)
from .outputs import check_language_model, check_output, save_whole


def search(
    model: ModelArgument,
    output: OutputArgument,
    max_increase: Annotated[
        str, typer.Option(help="How much worse the metric may get: a percentage, or a number in its own unit.")
    ] = "5%",
    metric: Annotated[
        str,
        typer.Option(
            help="perplexity or accuracy of next tokens on --text, a task of lm-evaluation-harness, or a file of one."
        ),
    ] = "perplexity",
    documents: Annotated[int | None, typer.Option(min=1, help="The most documents of a task. Default: all.")] = None,
    methods: Annotated[str, typer.Option(help="Methods to try, separated by commas.")] = "whitened",
    max_trials: Annotated[int, typer.Option(min=1, help="The most trials of each method.")] = 10,
    target_modules: TargetOption = "all-linear",
    exclude_modules: ExcludeOption = None,
    allocation: AllocationOption = None,
    form: FormOption = None,
    ceiling: CeilingOption = None,
    calibration: CalibrationOption = None,
    calibration_windows: CalibrationWindowsOption = 48,
    statistics: StatisticsOption = None,
    seed: SeedOption = None,
    run_folder: Annotated[Path | None, typer.Option(help="Folder for trials: a search that was killed goes on.")] = None,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the smallest compressed MODEL whose metric gets no worse than allowed, and save it to OUT."""
    output = output.resolve()
    check_output(output, model, overwrite)
    config = config_of(None, None, target_modules, exclude_modules, None, allocation, form, ceiling)
    known = read_statistics(config, calibration, statistics, seed)
    base, tokenizer = load_dense(model, dtype, device)
    check_language_model(base, model, "")
    skip = calibration_windows if text is None and calibration is None else 0  # both are of the reference text
    batches = read_batches(tokenizer, "--text", text, length, windows, skip)
    asked = {"metric": metric, "tolerance": max_increase, "evaluation": batches, "tokenizer": tokenizer, "documents": documents}
    asked |= {"methods": [method.strip() for method in methods.split(",")], "max_trials": max_trials}
    if known is None and statistics is not None:
        check_search(config, **asked)  # before minutes of calibration
        known = calibrated(base, tokenizer, config, calibration, length, calibration_windows, statistics, seed)
    if known is None:  # the search keeps what it gathers in its run folder
        data, seed = calibration_batches(tokenizer, calibration, length, calibration_windows), seed or 0
    else:
        data, seed = known, known.seed
    result = search_model(base, config, data, **asked, run_folder=run_folder, seed=seed)
    if result.model is None or result.chosen is None:
        raise CliError(f"no size is within {max_increase}; allow more with --max-increase.\n{result}")
    result.model.peft_config["default"].evaluation = {
        f"dense {result.metric}": result.dense_metric,
        result.metric: result.chosen.metric,
    }
    record = Record.of(result.model, plan=result.plan, search=result, angles=False).with_(model=model)
    save_whole(result.model, tokenizer, output, saving_with(record))
    if as_json:
        print(json.dumps({"model": model, "output": str(output), **result.to_dict()}))
    else:
        _print(result, output)


def _print(result: SearchResult, output: Path) -> None:
    head, *rows = (row[:-1] for row in result.rows())  # without the seconds, which 80 columns have no room for
    table = Table(*head)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "chosen" else None)
    table.caption = result.request
    console = Console()
    console.print(table)
    console.print(f"saved to {output}", highlight=False, soft_wrap=True)
