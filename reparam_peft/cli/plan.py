"""`reparam plan`: which rank each matrix would get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..compression.compress import plan as plan_model
from ..planning.plan import Plan
from .errors import CliError
from .inputs import load_dense, take_experts
from .options import CalibrationOptions, ConfigOptions, JsonOption, LengthOption, LoadOptions, ModelArgument, SeedOption
from .statistics_file import Calibration, check_folder, is_data_free


def plan(
    model: ModelArgument,
    *,
    options: ConfigOptions,
    calibration: CalibrationOptions,
    seed: SeedOption = None,
    length: LengthOption = 512,
    load: LoadOptions,
    output: Annotated[Path | None, typer.Option(help="File to write the plan to, for `reparam compress --plan`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print which rank each matrix of MODEL would get, what it stores and what it is predicted to cost; change nothing."""
    config = options.config()
    if is_data_free(config):
        raise CliError(f"a plan needs calibration; leave out --method {config.method} or add --allocation loss.")
    check_folder("--output", output)
    if output is not None and output.exists():
        try:
            Plan.load(output)
        except ValueError as error:
            raise CliError(f"--output {output} exists and holds no plan, and is not overwritten; name another file.") from error
    source = Calibration.of(calibration, length, seed)
    statistics = source.earlier(config)
    dense, tokenizer = load_dense(model, load.dtype, load.device)
    take_experts(config, dense, options.targets.experts)
    if statistics is None:
        statistics = source.gather(dense, config, source.batches(dense, tokenizer))
    made = plan_model(dense, config, statistics)
    if output is not None:
        made.save(output)
    print(json.dumps(made.to_dict()) if as_json else made)
