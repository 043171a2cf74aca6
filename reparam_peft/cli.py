"""The command line: `reparam compress` and `reparam evaluate`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from accelerate.state import PartialState
from datasets import load_dataset
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import ReparamConfig
from .demo import demo_folder, reference_text
from .evaluation import SizeReport, benchmark, perplexity, predicts_next_token, text_batches
from .model import ReparamModel
from .model_card import AUTO_CLASSES

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress pretrained transformers by low-rank reparameterisation.",
)
# Tables go to stdout, what happens meanwhile to stderr, so that `--json` can be piped.
out, err = Console(), Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model or of a compressed adapter, or `demo`.")
]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="Text to measure perplexity on: a file, or a Hub data set as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. "
        "Default: Python's language reference."
    ),
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="The most windows of text to evaluate.")]
DtypeOption = Annotated[str, typer.Option(help="Dtype to load the model in: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device, e.g. cpu or cuda. Default: the best there is.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


class CliError(Exception):
    """A mistake of the user or the environment, to be told in one line."""


@app.command(epilog="Example: `reparam compress demo compressed --keep 0.9`")
def compress(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the compressed adapter to.")],
    keep: Annotated[float | None, typer.Option(help="Fraction of the targeted parameters to store. Default: 0.8.")] = None,
    rank: Annotated[str | None, typer.Option(help="One rank for all matrices, or `full`; instead of --keep.")] = None,
    target_modules: Annotated[
        str, typer.Option(help="`all-linear`, a regular expression, or name endings separated by commas.")
    ] = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="Likewise, to leave out.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after, and generate a sample.")] = True,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL, save it to OUT, load it again, and say how large and how good it is."""
    if keep is not None and rank is not None:
        raise CliError("--keep and --rank exclude each other; give one.")
    output = output.resolve()
    _check_output(output, model, overwrite)
    config = _config(keep, rank, target_modules, exclude_modules)
    base, tokenizer = _load(model, dtype, device)
    if hasattr(base, "peft_config"):
        raise CliError(f"{model} is compressed already; give the model that it was made from.")
    if evaluate:
        _check_language_model(base, model, "; add --no-evaluate")
    figures: dict[str, float] = {}
    batches = _batches(tokenizer, text, length, windows) if evaluate else []
    if evaluate:
        err.print("measuring perplexity before …")
        figures["dense perplexity"] = perplexity(base, batches)
        sample = _generate(base, tokenizer)
    err.print("factorising …")
    start = time.perf_counter()
    compressed = get_peft_model(base, config)
    seconds = time.perf_counter() - start
    sizes = compressed.size_report()
    _save(compressed, tokenizer, output)
    del base, compressed
    err.print("loading it again …")
    source, _ = _load(model, dtype, device)
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
        figures["perplexity"] = perplexity(reloaded, batches)
        reloaded.peft_config["default"].evaluation = dict(figures)
        _save(reloaded, tokenizer, output)
        result |= {"evaluation": figures, "sample": {"dense": sample, "compressed": _generate(reloaded, tokenizer)}}
    if as_json:
        print(json.dumps(result))
    else:
        _print_compression(result, sizes)


@app.command(epilog="Example: `reparam evaluate compressed --text article.txt --json`")
def evaluate(
    model: ModelArgument,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    speed: Annotated[bool, typer.Option(help="Also measure latency and peak memory.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL on a text, its size, and on request its speed."""
    loaded, tokenizer = _load(model, dtype, device)
    _check_language_model(loaded, model, "")
    figures: dict[str, Any] = {"perplexity": perplexity(loaded, _batches(tokenizer, text, length, windows))}
    figures["parameters"] = sum(p.numel() for p in loaded.parameters())
    figures["bytes"] = sum(p.numel() * p.element_size() for p in loaded.parameters())
    if speed:
        timing = benchmark(loaded, prompt_length=length)
        figures |= {name.replace("_", " "): value for name, value in timing.to_dict().items() if value is not None}
    sizes = loaded.size_report() if isinstance(getattr(loaded, "base_model", None), ReparamModel) else None
    if as_json:
        print(json.dumps({"model": model, **figures, **({"size": sizes.to_dict()} if sizes else {})}))
        return
    out.print(_figures_table(figures))
    if sizes:
        out.print(_size_table(sizes))


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


def _check_output(output: Path, model: str, overwrite: bool) -> None:
    """Refuse, before any work, an OUT whose replacement would delete something else than an earlier result."""
    if output.exists() and (output.is_file() or any(output.iterdir())) and not overwrite:
        raise CliError(f"{output} already exists; choose another folder or add --overwrite.")
    if output.is_file():
        raise CliError(f"{output} is a file; OUT must be a folder.")
    if Path.cwd().is_relative_to(output):
        raise CliError(f"{output} is or holds the current folder; choose another folder.")
    if os.path.isdir(model) and Path(model).resolve().is_relative_to(output):
        raise CliError(f"{output} holds the model itself, which must not be overwritten; choose another folder.")
    if output.exists() and any(output.iterdir()) and not (output / "adapter_config.json").exists():
        raise CliError(f"{output} holds no compressed model but other files, which are not overwritten; choose another folder.")


def _config(keep: float | None, rank: str | None, target_modules: str, exclude_modules: str | None) -> Any:
    """The config of `compress`, its values checked."""
    options: dict[str, Any] = {"target_modules": _names(target_modules)}
    if exclude_modules is not None:
        options["exclude_modules"] = _names(exclude_modules)
    if keep is not None:
        options["keep"] = keep
    if rank is not None:
        if rank != "full" and not rank.isdecimal():
            raise CliError(f"--rank must be a positive whole number or `full`, got {rank!r}.")
        options["r"] = rank if rank == "full" else int(rank)
    return ReparamConfig(**options)


def _names(value: str) -> str | list[str]:
    """Name endings where the value is a list of words, else a regular expression (or `all-linear`)."""
    words = value.split(",")
    plain = all(word.strip().replace("_", "").replace(".", "").isalnum() for word in words)
    return [word.strip() for word in words] if plain and value != "all-linear" else value


def _load(model: str, dtype: str, device: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A dense model or a compressed one, on its device, and its tokenizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise CliError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    try:
        target = torch.device(device) if device else PartialState().default_device
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise CliError(f"--device {device}: {error}") from error
    source = str(demo_folder()) if model == "demo" else model
    if os.path.exists(source) and not os.path.isdir(source):
        raise CliError(f"{source} is a file; MODEL must be a folder, a Hub id or `demo`.")
    try:
        if os.path.exists(os.path.join(source, "adapter_config.json")):
            task_type = PeftConfig.from_pretrained(source).task_type
            loader = getattr(peft, AUTO_CLASSES.get(task_type, "AutoPeftModel"))
        else:
            architectures = AutoConfig.from_pretrained(source).architectures or [""]
            named = getattr(transformers, architectures[0], None)
            loader = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
        loaded = loader.from_pretrained(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CliError(f"{model} cannot be loaded: {error}") from error
    return loaded.to(target).eval(), tokenizer


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write model and tokenizer beside `output` and move them there whole, so that nothing half-written stays."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder, aside = (Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent)) for _ in range(2))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.chmod(0o755)
        earlier = output.rename(aside / output.name) if output.exists() else None
        try:
            folder.rename(output)
        except OSError:
            if earlier is not None:
                earlier.rename(output)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _batches(tokenizer: PreTrainedTokenizerBase, text: str | None, length: int, windows: int) -> list[dict[str, Tensor]]:
    """Windows of a file, of a Hub data set, or of the reference text."""
    if text is None:
        words = reference_text()
    elif os.path.isfile(text):
        words = Path(text).read_text(encoding="utf-8")
    elif os.path.exists(text) or text.endswith((".txt", ".md")):
        raise CliError(f"--text {text}: no such file.")
    else:
        name, *rest = text.split(":")
        split = rest.pop() if rest else "test"
        rows = load_dataset(name, *rest, split=split)
        try:
            words = "\n\n".join(row["text"] for row in rows)
        except KeyError:
            raise CliError(f"--text {text}: the data set has no column `text`.") from None
    return text_batches(tokenizer, words, length=length, limit=windows)


def _check_language_model(model: Any, name: str, remedy: str) -> None:
    if not predicts_next_token(model):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise CliError(f"{name} is a {type(base).__name__}, and perplexity is of causal language models only{remedy}.")


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A short greedy continuation."""
    prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _print_compression(result: dict[str, Any], sizes: SizeReport) -> None:
    out.print(_size_table(sizes))
    if "evaluation" in result:
        out.print(_figures_table(result["evaluation"]))
        for name, words in result["sample"].items():
            out.print(f"[bold]{name}:[/] ", end="")
            out.print(words, markup=False, highlight=False)
    out.print(f"factorised in {result['seconds']:.1f} s, saved to {result['output']}", highlight=False)


def _size_table(sizes: SizeReport) -> Table:
    table = Table("size", "before", "after", "kept")
    for part, unit, before, after, kept in sizes.rows():
        table.add_row(f"{part}, {unit}", f"{before:,}", f"{after:,}", f"{kept:.1%}")
    dense = len(sizes.dense_modules)
    table.caption = f"{len(sizes.matrices) - dense} matrices factorised, {dense} left dense"
    return table


def _figures_table(figures: dict[str, Any]) -> Table:
    table = Table("measure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    return table
