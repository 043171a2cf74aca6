"""The command line: `reparam compress`, `plan`, `search`, `heal`, `evaluate`, `report` and `export`."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors import SafetensorError

from .checkpoint import CheckpointLoader
from .compression import compress as compress_model
from .compression import plan as plan_model
from .evaluation import SizeReport, benchmark, perplexity
from .export_command import export
from .heal_command import heal
from .model import ReparamModel
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
    SmallerOption,
    StatisticsOption,
    TargetOption,
    TextOption,
    WindowsOption,
)
from .outputs import PROMPTS, check_language_model, check_output, continuation, figures_table, save_whole, size_table
from .planning import Plan
from .preparation import calibrated, check_folder, config_of, is_data_free, load_dense, read_statistics
from .records import Record, saving_with
from .refinement import Refinement
from .report_command import report
from .run_folder import PLAN
from .search_command import search
from .settings_file import Command
from .sources import CliError, calibrated_windows, load_model, read_batches

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress pretrained transformers by low-rank reparameterisation.",
)
# Tables go to stdout, what happens meanwhile to stderr, so that `--json` can be piped.
out, err = Console(), Console(stderr=True)


def _command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What makes a function a command: with `--config`, and examples in its help."""
    return app.command(cls=Command, epilog="Examples:\n\n" + "\n\n".join(f"- `reparam {example}`" for example in examples))


def _show_version(asked: bool) -> None:
    if asked:
        print(version("reparam_peft"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")] = False,
) -> None:
    """Options of `reparam` itself."""


@_command(
    "compress demo compressed --keep 0.9",
    "compress MODEL OUT --calibration train.txt --text test.txt --sequential --refine --run-folder blocks",
    "compress --config settings.yaml --seed 1",
)
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


@_command(
    "plan demo --keep 0.8 --statistics demo.safetensors --output plan.json",
    "plan MODEL --config settings.yaml --json",
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


@_command("evaluate compressed --text article.txt --json", "evaluate compressed --speed --config settings.yaml")
def evaluate(
    model: ModelArgument,
    keep: SmallerOption = None,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    speed: Annotated[bool, typer.Option(help="Also measure latency and peak memory.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL on a text, its size, and on request its speed."""
    loaded, tokenizer = load_model(model, dtype, device, keep=keep)
    check_language_model(loaded, model, "")
    batches = read_batches(tokenizer, "--text", text, length, windows, calibrated_windows(length) if text is None else 0)
    figures: dict[str, Any] = {"perplexity": perplexity(loaded, batches, progress=True)}
    sizes = loaded.size_report() if isinstance(getattr(loaded, "base_model", None), ReparamModel) else None
    whole = sizes.to_dict()["model"] if sizes else {}
    figures["parameters"] = whole.get("stored_parameters", sum(p.numel() for p in loaded.parameters()))
    figures["bytes"] = whole.get("stored_bytes", _bytes(loaded))
    if speed:
        timing = benchmark(loaded, prompt_length=length)
        figures |= {name.replace("_", " "): value for name, value in timing.to_dict().items() if value is not None}
    if as_json:
        print(json.dumps({"model": model, **figures, **({"size": sizes.to_dict()} if sizes else {})}))
        return
    out.print(figures_table(figures))
    if sizes:
        out.print(size_table(sizes))


_command("search demo compressed --max-increase 5%", "search --config settings.yaml --run-folder trials")(search)
_command(
    "heal compressed healed --calibration article.txt --steps 200",
    "heal --config settings.yaml --run-folder steps",
)(heal)
_command("report compressed", "report compressed --no-measure --output page", "report --config settings.yaml")(report)
_command(
    "export compressed standalone",
    "export compressed small --quantize int8",
    "export --config settings.yaml --overwrite",
)(export)


def main() -> None:
    """Entry point: errors in one line on stderr, exit code 1; wrong usage exits with 2; REPARAM_DEBUG=1 shows tracebacks."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("REPARAM_DEBUG"):
        app()
    try:
        app()
    except (CliError, ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, SafetensorError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _read_plan(
    path: Path | None, keep: float | None, rank: str | None, allocation: str | None, ceiling: float | None
) -> Plan | None:
    if path is None:
        return None
    if not (keep is None and rank is None and allocation is None and ceiling is None):
        raise CliError("--plan holds the ranks; leave out --keep, --rank, --allocation and --ceiling.")
    return Plan.load(path)


def _bytes(model: Any) -> int:
    """What a model stores; quantised factors as they are in a checkpoint. Shared tensors count once."""
    loader = getattr(model, "hf_quantizer", None)
    state = loader.get_state_dict_and_metadata(model)[0] if isinstance(loader, CheckpointLoader) else None
    tensors = model.parameters() if state is None else {tensor.data_ptr(): tensor for tensor in state.values()}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _print_compression(result: dict[str, Any], sizes: SizeReport) -> None:
    out.print(size_table(sizes))
    if "evaluation" in result:
        out.print(figures_table(result["evaluation"]))
        for name, words in result["sample"].items():
            out.print(f"[bold]{name}:[/] ", end="")
            out.print(words, markup=False, highlight=False, soft_wrap=True)
    out.print(f"factorised in {result['seconds']:.1f} s, saved to {result['output']}", highlight=False, soft_wrap=True)
