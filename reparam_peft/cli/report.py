"""`reparam report`: what was done, what came of it, and pictures, as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path

from ..evaluation.perplexity import perplexity
from ..evaluation.speed import benchmark
from ..report.angles import mean_input_angles
from ..report.page import check_report_folder, write_report
from ..report.record import Record, read_record, record_of_adapter
from ..runtime.modules import predicts_next_token
from .command_options import ReportOptions
from .errors import CliError
from .inputs import held_out, load_compressed, load_dense_of
from .options import LoadOptions, TextOptions
from .outputs import PROMPTS, continuation, err, out


def report(options: ReportOptions) -> None:
    """Do what `reparam report --help` says."""
    run, dense, text, load = options.run, options.dense, options.text, options.load
    measures = options.measure
    adapter = (run / "adapter_config.json").exists()
    output = run / "report" if options.output is None else options.output
    if not (measures and adapter) and not (dense is None and text.text is None and load.device is None):
        raise CliError("--dense, --text and --device are for measuring the models of an adapter; leave them out.")
    check_report_folder(output)
    if not run.is_dir():
        raise CliError(f"{run}: there is no such folder.")
    record = read_record(run)
    if record is None and not adapter:
        raise CliError(f"{run} is neither an adapter of reparam_peft nor the folder of a run.")
    if measures and adapter:
        record = _measured(run, dense, text, load)
    elif record is None:
        raise CliError(f"{run} holds no record of its run; leave out --no-measure, so that its model is looked at.")
    page = write_report(record, output)
    record.save(output / "record.json")
    if options.as_json:
        print(json.dumps({"run": str(run), "report": str(page), "evaluation": record.evaluation, "speed": record.speed}))
    else:
        out.print(f"report written to {page}", highlight=False, soft_wrap=True)


def _measured(run: Path, dense_model: str | None, text: TextOptions, load: LoadOptions) -> Record:
    """The record of an adapter, with what can be measured of both models."""
    small, tokenizer = load_compressed(str(run), load.dtype, load.device)
    record = record_of_adapter(run, small)
    dense = load_dense_of(str(run), dense_model, load.dtype, load.device)
    err.print("comparing what layers look at …")
    record = record.with_(angles=mean_input_angles(small))
    if predicts_next_token(small):
        if text.text is not None or not {"perplexity", "dense perplexity"} <= set(record.evaluation):
            err.print("measuring perplexity …")
            batches = held_out(tokenizer, text)
            figures = {
                "dense perplexity": perplexity(dense, batches, progress=True),
                "perplexity": perplexity(small, batches, progress=True),
            }
            record = record.with_(evaluation={**record.evaluation, **figures})
        err.print("continuing texts …")
        samples = [
            {
                "prompt": prompt,
                "dense": continuation(dense, tokenizer, prompt),
                "compressed": continuation(small, tokenizer, prompt),
            }
            for prompt in PROMPTS
        ]
        record = record.with_(samples=samples)
    if not small.config.is_encoder_decoder:
        err.print("measuring speed …")
        record = record.with_(speed=benchmark(small, dense, prompt_length=text.length, repeats=3).to_dict())
    return record
