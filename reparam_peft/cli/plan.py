"""`reparam plan`: which rank each matrix would get."""

from __future__ import annotations

import json

from ..compression.compress import plan as plan_model
from ..planning.plan import Plan
from .command_options import PlanOptions
from .errors import CliError
from .inputs import load_dense, take_experts
from .statistics_file import Calibration, check_folder, is_data_free


def plan(options: PlanOptions) -> None:
    """Do what `reparam plan --help` says."""
    config = options.config.config()
    if is_data_free(config):
        raise CliError(f"a plan needs calibration; leave out --method {config.method} or add --allocation loss.")
    output = options.output
    check_folder("--output", output)
    if output is not None and output.exists():
        try:
            Plan.load(output)
        except ValueError as error:
            raise CliError(f"--output {output} exists and holds no plan, and is not overwritten; name another file.") from error
    source = Calibration.of(options.calibration, options.length, options.seed)
    statistics = source.earlier(config)
    dense, tokenizer = load_dense(options.model, options.load.dtype, options.load.device)
    take_experts(config, dense, options.config.targets.experts)
    if statistics is None:
        statistics = source.gather(dense, config, source.batches(dense, tokenizer))
    made = plan_model(dense, config, statistics)
    if output is not None:
        made.save(output)
    print(json.dumps(made.to_dict()) if options.as_json else made)
