"""`reparam report`: what was done, what came of it, and pictures, as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftConfig
from rich.console import Console

from ..evaluation.perplexity import perplexity
from ..evaluation.speed import benchmark
from ..report.angles import mean_input_angles
from ..report.page import check_report_folder, write_report
from ..report.record import Record, read_record, record_of_adapter
from ..runtime.modules import predicts_next_token
from ..tuner.model import ReparamModel
from .errors import CliError
from .inputs import calibrated_windows, load_model, read_batches
from .options import DeviceOption, DtypeOption, JsonOption, LengthOption, TextOption, WindowsOption
from .outputs import PROMPTS, continuation


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that a command wrote an adapter to, or the run folder of `compress`.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to write the report to. Default: RUN/report.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Load both models: for speed, samples, angles between layers, and perplexity if not known.")
    ] = True,
    dense: Annotated[str | None, typer.Option(help="The dense model. Default: the one that RUN was made from.")] = None,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report on RUN: one HTML file that needs no network, its pictures as PNG, and its data as JSON."""
    adapter = (run / "adapter_config.json").exists()
    output = run / "report" if output is None else output
    if not (measure and adapter) and not (dense is None and text is None and device is None):
        raise CliError("--dense, --text and --device are for measuring the models of an adapter; leave them out.")
    check_report_folder(output)
    record = read_record(run) if run.is_dir() else None
    if record is None and not adapter:
        raise CliError(f"{run} is neither an adapter of reparam_peft nor the folder of a run.")
    if measure and adapter:
        record = _measured(run, dense, text, length, windows, dtype, device)
    elif record is None:
        raise CliError(f"{run} holds no record of its run; leave out --no-measure, so that its model is looked at.")
    page = write_report(record, output)
    record.save(output / "record.json")
    if as_json:
        print(json.dumps({"run": str(run), "report": str(page), "evaluation": record.evaluation, "speed": record.speed}))
    else:
        Console().print(f"report written to {page}", highlight=False, soft_wrap=True)


def _measured(
    run: Path,
    dense_model: str | None,
    text: str | None,
    length: int,
    windows: int,
    dtype: str,
    device: str | None,
) -> Record:
    """The record of an adapter, with what can be measured of both models."""
    console = Console(stderr=True)
    small, tokenizer = load_model(str(run), dtype, device)
    if not isinstance(getattr(small, "base_model", None), ReparamModel):
        raise CliError(f"{run} is no compressed adapter; make one with `reparam compress`.")
    record = record_of_adapter(run, small)
    base, _ = load_model(dense_model or PeftConfig.from_pretrained(run).base_model_name_or_path, dtype, device)
    console.print("comparing what layers look at …")
    parts: dict[str, Any] = {"angles": mean_input_angles(small)}
    if predicts_next_token(small):
        if text is not None or not {"perplexity", "dense perplexity"} <= set(record.evaluation):
            console.print("measuring perplexity …")
            skip = calibrated_windows(length) if text is None else 0
            batches = read_batches(tokenizer, "--text", text, length, windows, skip)
            figures = {
                "dense perplexity": perplexity(base, batches, progress=True),
                "perplexity": perplexity(small, batches, progress=True),
            }
            parts["evaluation"] = {**record.evaluation, **figures}
        console.print("continuing texts …")
        parts["samples"] = [
            {
                "prompt": prompt,
                "dense": continuation(base, tokenizer, prompt),
                "compressed": continuation(small, tokenizer, prompt),
            }
            for prompt in PROMPTS
        ]
    if not small.config.is_encoder_decoder:
        console.print("measuring speed …")
        parts["speed"] = benchmark(small, base, prompt_length=length, repeats=3).to_dict()
    return record.with_(**parts)
