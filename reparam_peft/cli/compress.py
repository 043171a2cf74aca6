"""`reparam compress`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftModel, get_peft_model

from ..blockwise.refinement import Refinement
from ..compression.compress import compress as compress_model
from ..compression.compress import plan as plan_model
from ..evaluation.perplexity import perplexity
from ..planning.plan import Plan
from ..report.record import Record, saving_with
from ..runtime.run_folder import PLAN
from ..tuner.sizes import SizeReport
from .errors import CliError
from .inputs import calibrated, config_of, is_data_free, load_dense, load_model, read_batches, read_statistics
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
    OutputArgument,
    OverwriteOption,
    RankOption,
    SeedOption,
    StatisticsOption,
    TargetOption,
    TextOption,
    WindowsOption,
)
from .outputs import PROMPTS, check_language_model, check_output, continuation, err, figures_table, out, save_whole, size_table


def compress(
    model: ModelArgument,
    output: OutputArgument,
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
    plan: Annotated[Path | None, typer.Option(help="Plan that `reparam plan --output` wrote, instead of --keep.")] = None,
    seed: SeedOption = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Block by block: fit each matrix to what the earlier ones became.")
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Block by block: train each block to compute what the original one does.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of --refine. Default: 4.")] = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="Folder for finished blocks and their errors: a run that was killed goes on from there.")
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="Folder for activations during --sequential or --refine. Default: in memory.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after, and generate a sample.")] = True,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL, save it to OUT, load it again, and say how large and how good it is."""
    output = output.resolve()
    check_output(output, model, overwrite)
    ranks = _read_plan(plan, keep, rank, allocation, ceiling)
    if ranks is not None:
        keep, method, allocation, form = ranks.keep, method or ranks.method, ranks.allocation, form or ranks.form
        ceiling = ranks.ceiling
    config = config_of(keep, rank, target_modules, exclude_modules, method, allocation, form, ceiling)
    if ranks is not None and is_data_free(config):
        raise CliError("--plan is for calibrated methods; leave out --method svd.")
    by_block = sequential or refine
    if by_block and is_data_free(config):
        raise CliError("--sequential and --refine need calibration; leave out --method svd.")
    if not refine and epochs is not None:
        raise CliError("--epochs are those of --refine; add it.")
    if not by_block and not (run_folder is None and offload_folder is None):
        raise CliError("--run-folder and --offload-folder are for --sequential and --refine.")
    known = read_statistics(config, None if by_block else calibration, statistics, seed)
    base, tokenizer = load_dense(model, dtype, device)
    if evaluate:
        check_language_model(base, model, "; add --no-evaluate")
    skip = 0
    if text is None and calibration is None and not is_data_free(config):  # both are of the reference text
        skip = max(0 if known is None else math.ceil(known.tokens / length), calibration_windows * (known is None or by_block))
    batches = read_batches(tokenizer, "--text", text, length, windows, skip) if evaluate else []
    if known is None and not is_data_free(config):
        known = calibrated(base, tokenizer, config, calibration, length, calibration_windows, statistics, seed)
    figures: dict[str, float] = {}
    if evaluate:
        err.print("measuring perplexity before …")
        figures["dense perplexity"] = perplexity(base, batches, progress=True)
        sample = continuation(base, tokenizer, PROMPTS[0])
    err.print("factorising …")
    start = time.perf_counter()
    plans_itself = run_folder is not None or (refine and config.method == "svd")  # which moves biases for `refine` only
    if ranks is None and known is not None and not plans_itself:
        ranks = plan_model(base, config, known)
    if known is None:
        compressed = get_peft_model(base, config)
    elif by_block:
        blocks = read_batches(tokenizer, "--calibration", calibration, length, calibration_windows)
        how = {"sequential": sequential, "run_folder": run_folder, "offload_folder": offload_folder, "statistics": known}
        how["refine"] = Refinement(seed=known.seed, **({} if epochs is None else {"epochs": epochs})) if refine else False
        compressed = compress_model(base, config, blocks, plan=ranks, **how)
    else:
        compressed = compress_model(base, config, known, plan=ranks)
    seconds = time.perf_counter() - start
    sizes = compressed.size_report()
    if run_folder is not None:
        ranks = Plan.load(run_folder / PLAN)  # a run that goes on keeps the plan that it began with
    record = Record.of(compressed, plan=ranks, run_folder=run_folder, angles=False).with_(model=model)
    save_whole(compressed, tokenizer, output, saving_with(record))
    del base, compressed
    err.print("loading it again …")
    source, _ = load_model(model, dtype, device)
    reloaded = PeftModel.from_pretrained(source, output)
    result: dict[str, Any] = {
        "model": model,
        "output": str(output),
        "seconds": round(seconds, 2),
        "keep": sizes.keep,
        "size": sizes.to_dict(),
        "dense_modules": sizes.dense_modules,
    }
    if evaluate:
        err.print("measuring perplexity after …")
        figures["perplexity"] = perplexity(reloaded, batches, progress=True)
        reloaded.peft_config["default"].evaluation = dict(figures)
        samples = {"dense": sample, "compressed": continuation(reloaded, tokenizer, PROMPTS[0])}
        record = record.with_(evaluation=dict(figures), samples=[{"prompt": PROMPTS[0], **samples}])
        save_whole(reloaded, tokenizer, output, saving_with(record))
        result |= {"evaluation": figures, "sample": samples}
    if as_json:
        print(json.dumps(result))
    else:
        _print_compression(result, sizes)


def _read_plan(
    path: Path | None, keep: float | None, rank: str | None, allocation: str | None, ceiling: float | None
) -> Plan | None:
    if path is None:
        return None
    if not (keep is None and rank is None and allocation is None and ceiling is None):
        raise CliError("--plan holds the ranks; leave out --keep, --rank, --allocation and --ceiling.")
    return Plan.load(path)


def _print_compression(result: dict[str, Any], sizes: SizeReport) -> None:
    out.print(size_table(sizes))
    if "evaluation" in result:
        out.print(figures_table(result["evaluation"]))
        for name, words in result["sample"].items():
            out.print(f"[bold]{name}:[/] ", end="")
            out.print(words, markup=False, highlight=False, soft_wrap=True)
    out.print(f"factorised in {result['seconds']:.1f} s, saved to {result['output']}", highlight=False, soft_wrap=True)
