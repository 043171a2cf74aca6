"""`reparam search`: the smallest model that is good enough."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..config.fields import CALIBRATED
from ..report.record import Record, saving_with
from ..searching.goal import Goal, check_goal
from ..searching.result import SearchResult
from ..searching.search import find_smallest
from .errors import CliError
from .inputs import held_out, load_dense, take_experts
from .options import (
    CalibrationOptions,
    ConfigOptions,
    JsonOption,
    LoadOptions,
    ModelArgument,
    OutputArgument,
    OverwriteOption,
    SeedOption,
    StorageOptions,
    TargetOptions,
    TextOptions,
)
from .outputs import check_language_model, check_output, note_evaluation, out, save_whole
from .statistics_file import Calibration


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


def search(
    model: ModelArgument,
    output: OutputArgument,
    *,
    wanted: GoalOptions,
    targets: TargetOptions,
    storage: StorageOptions,
    calibration: CalibrationOptions,
    seed: SeedOption = None,
    run_folder: Annotated[Path | None, typer.Option(help="Folder for trials: a search that was killed goes on.")] = None,
    text: TextOptions,
    load: LoadOptions,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the smallest compressed MODEL whose metric gets no worse than allowed, and save it to OUT."""
    output = output.resolve()
    beside = (run_folder, calibration.statistics, calibration.calibration, text.text)
    check_output(output, model, overwrite, *beside)
    config = ConfigOptions(targets=targets, storage=storage).config()
    source = Calibration.of(calibration, text.length, seed, run_folder)
    statistics = source.earlier(config)
    dense, tokenizer = load_dense(model, load.dtype, load.device)
    take_experts(config, dense, targets.experts)
    check_language_model(dense, model, "")
    goal = Goal(
        metric=wanted.metric,
        tolerance=wanted.max_increase,
        evaluation=held_out(tokenizer, text),
        tokenizer=tokenizer,
        documents=wanted.documents,
        methods=[method.strip() for method in wanted.methods.split(",")],
        max_trials=wanted.max_trials,
    )
    if statistics is None and source.file is not None:
        check_goal(goal, config)  # before minutes of calibration
        statistics = source.gather(dense, config, source.batches(dense, tokenizer))
    if statistics is None:  # the search keeps what it gathers in its run folder
        batches = source.batches(dense, tokenizer)
        result = find_smallest(dense, config, batches, goal, run_folder=run_folder, seed=seed or 0)
    else:
        result = find_smallest(dense, config, statistics, goal, run_folder=run_folder, seed=statistics.seed)
    if result.model is None or result.chosen is None:
        raise CliError(f"no size is within {wanted.max_increase}; allow more with --max-increase.\n{result}")
    figures = {f"dense {result.metric}": result.dense_metric, result.metric: result.chosen.metric}
    note_evaluation(result.model, figures)
    record = Record.of(result.model, plan=result.plan, search=result, angles=False).with_(model=model)
    save_whole(result.model, tokenizer, output, *beside, overwrite=overwrite, save=saving_with(record))
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
    out.print(table)
    out.print(f"saved to {output}", highlight=False, soft_wrap=True)
