"""`reparam search`: the smallest model that is good enough."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from ..report.record import Record, saving_with
from ..searching.goal import Goal, check_goal
from ..searching.result import SearchResult
from ..searching.search import find_smallest
from .command_options import SearchOptions
from .errors import CliError
from .inputs import held_out, load_dense, take_experts
from .options import BudgetOptions, ConfigOptions
from .outputs import check_language_model, check_output, note_evaluation, out, save_whole
from .statistics_file import Calibration


def search(options: SearchOptions) -> None:
    """Do what `reparam search --help` says."""
    output, wanted, text, seed = options.output.resolve(), options.wanted, options.text, options.seed
    beside = (options.run_folder, options.calibration.statistics, options.calibration.calibration, text.text)
    check_output(output, options.model, options.overwrite, *beside)
    config = ConfigOptions(budget=BudgetOptions(), targets=options.targets, storage=options.storage).config()
    source = Calibration.of(options.calibration, text.length, seed, options.run_folder)
    statistics = source.earlier(config)
    dense, tokenizer = load_dense(options.model, options.load.dtype, options.load.device)
    take_experts(config, dense, options.targets.experts)
    check_language_model(dense, options.model, "")
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
        result = find_smallest(dense, config, batches, goal, run_folder=options.run_folder, seed=seed or 0)
    else:
        result = find_smallest(dense, config, statistics, goal, run_folder=options.run_folder, seed=statistics.seed)
    if result.model is None or result.chosen is None:
        raise CliError(f"no size is within {wanted.max_increase}; allow more with --max-increase.\n{result}")
    figures = {f"dense {result.metric}": result.dense_metric, result.metric: result.chosen.metric}
    note_evaluation(result.model, figures)
    record = Record.of(result.model, plan=result.plan, search=result, angles=False).with_(model=options.model)
    save_whole(result.model, tokenizer, output, *beside, overwrite=options.overwrite, save=saving_with(record))
    if options.as_json:
        print(json.dumps({"model": options.model, "output": str(output), **result.to_dict()}))
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
