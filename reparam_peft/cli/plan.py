"""`reparam plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..compression.compress import plan as plan_model
from .errors import CliError
from .inputs import calibrated, check_folder, config_of, is_data_free, load_dense, read_statistics
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
    KeepOption,
    LengthOption,
    MethodOption,
    ModelArgument,
    RankOption,
    SeedOption,
    StatisticsOption,
    TargetOption,
)


def plan(
    model: ModelArgument,
    keep: KeepOption = None,
    rank: RankOption = None,
    target_modules: TargetOption = "all-linear",
    exclude_modules: ExcludeOption = None,
    method: MethodOption = None,
    allocation: AllocationOption = None,
    form: FormOption = None,
    ceiling: CeilingOption = None,
    calibration: CalibrationOption = None,
    calibration_windows: CalibrationWindowsOption = 48,
    statistics: StatisticsOption = None,
    seed: SeedOption = None,
    length: LengthOption = 512,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    output: Annotated[Path | None, typer.Option(help="File to write the plan to, for `reparam compress --plan`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print which rank each matrix of MODEL would get, what it stores and what it is predicted to cost; change nothing."""
    config = config_of(keep, rank, target_modules, exclude_modules, method, allocation, form, ceiling)
    if is_data_free(config):
        raise CliError("a plan needs calibration; leave out --method svd or add --allocation loss.")
    check_folder("--output", output)
    known = read_statistics(config, calibration, statistics, seed)
    base, tokenizer = load_dense(model, dtype, device)
    if known is None:
        known = calibrated(base, tokenizer, config, calibration, length, calibration_windows, statistics, seed)
    made = plan_model(base, config, known)
    if output is not None:
        made.save(output)
    if as_json:
        print(json.dumps(made.to_dict()))
    else:
        print(made)
