"""What the command line writes: folders that are moved into place whole, and tables."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..report.page import INDEX
from ..runtime.files import follow_umask, is_ours, unfinished
from ..runtime.json_files import read_json
from ..runtime.modules import predicts_next_token
from ..standalone.checkpoint import METHOD
from ..tuner.model import config_of
from ..tuner.sizes import SizeReport
from .errors import CliError

PROMPTS = ("The capital of France is", "In the beginning of the twentieth century,", "def factorial(n):")


# What commands write into OUT, beside the tokenizer's files.
_OURS = frozenset(
    [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.spm",
        "*.codes",
        "*.onnx",
        "*.onnx.data",
        "README.md",
        "vocab.txt",
        "dict.txt",
        "merges.txt",
        "modeling_reparam.py",
        ".gitattributes",
    ]
)
_FOLDERS = ("additional_chat_templates",)  # of the tokenizer
_WHOLE = "whole"  # the name of all of an earlier OUT, where it is moved away to


def check_output(output: Path, model: str, overwrite: bool, *beside: Path | str | None) -> None:
    """Refuse, before any work, an OUT whose replacement would delete something else than an earlier result.

    Args:
        output: OUT, resolved.
        model: MODEL.
        overwrite: whether an earlier result may be replaced.
        beside: other files and folders that the command is given, which may be in OUT and stay.
    """
    for path in beside:
        if path is not None and _resolved(path) == output:
            raise CliError(f"{output} is OUT and {path} as well; choose another one.")
    for earlier in _earlier(output):  # of a run that was killed while it put its result in place
        _put_back(earlier, output)
    others = _replaced(output, beside)
    if (output.is_file() or others) and not overwrite:
        raise CliError(f"{output} already exists; choose another folder or add --overwrite.")
    if output.is_file():
        raise CliError(f"{output} is a file; OUT must be a folder.")
    if Path.cwd().is_relative_to(output):
        raise CliError(f"{output} is or holds the current folder; choose another folder.")
    if os.path.isdir(model):
        source = Path(model).resolve()
        if source.is_relative_to(output):
            raise CliError(f"{output} holds the model itself, which must not be overwritten; choose another folder.")
        if output.is_relative_to(source):
            raise CliError(f"{output} is inside of the model's folder {source}; choose a folder elsewhere.")
    foreign = [path.name for path in others if not _is_result(path)]
    if others and (foreign or not _is_compressed(output)):
        named = f" ({foreign[0]})" if foreign else ""
        raise CliError(
            f"{output} holds no compressed model but other files{named}, which are not overwritten; choose another folder."
        )


def _resolved(path: Path | str) -> Path:
    """Where a file or folder is, not where it leads to."""
    return Path(path).absolute().parent.resolve() / Path(path).name


def _replaced(output: Path, beside: Iterable[Path | str | None]) -> list[Path]:
    """What is in OUT, without what holds other files and folders that a command is given."""
    kept = {where.relative_to(output).parts[0] for path in beside if path and (where := _resolved(path)).is_relative_to(output)}
    return sorted(path for path in output.iterdir() if path.name not in kept) if output.is_dir() else []


def _is_result(path: Path) -> bool:
    """Whether something in OUT may have been written by a command."""
    if is_ours(path):
        return True
    if path.is_dir():
        return path.name in _FOLDERS or (path.name == "report" and (path / INDEX).is_file())
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in _OURS)


def _is_compressed(folder: Path) -> bool:
    """Whether a folder holds an adapter of this package or a standalone checkpoint."""
    try:
        if (folder / "adapter_config.json").exists():
            return read_json(folder / "adapter_config.json")["peft_type"] == "REPARAM"
        config = read_json(folder / "config.json")
        return "reparam_layers" in config or config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_whole(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *beside: Path | str | None,
    overwrite: bool,
    save: Callable[[Any, Path], None] | None = None,
) -> None:
    """Write model and tokenizer beside `output` and move them there whole, so that nothing half-written stays.

    Args:
        model: to save.
        tokenizer: of the model.
        output: OUT, as `check_output` lets it pass.
        beside: what stays in OUT, as for `check_output`. Where something does, files are moved in one by one, the config last.
        overwrite: whether an earlier result may be replaced.
        save: writes the model; None: its own `save_pretrained`.

    Raises:
        CliError: OUT has appeared or changed meanwhile. It stays as it is, and the result is kept beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = unfinished(output)
    try:
        (save or type(model).save_pretrained)(model, folder)
        tokenizer.save_pretrained(folder)
        follow_umask(folder)
        try:
            check_output(output, "", overwrite, *beside)
        except CliError as error:
            kept = next(path for n in count(1) if not (path := output.with_name(f"{output.name}-{n}")).exists())
            folder.rename(kept)
            raise CliError(f"{error} The result is in {kept}.") from error
        _replace(output, folder, beside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(output: Path, folder: Path, beside: Iterable[Path | str | None]) -> None:
    """Put what is in a folder in the place of an earlier result, which an error or an interrupt brings back."""
    replaced = _replaced(output, beside)
    stays = output.exists() and len(replaced) < len(list(output.iterdir()))
    earlier = output.with_name(f".{output.name}.{secrets.token_hex(8)}.earlier")
    earlier.mkdir()
    with ExitStack() as on_error:
        on_error.callback(_put_back, earlier, output)
        for path in replaced if stays else [output] if output.exists() else []:
            path.rename(earlier / (path.name if stays else _WHOLE))
        if stays:
            for path in sorted(folder.iterdir(), key=lambda path: path.name in ("adapter_config.json", "config.json")):
                on_error.callback((output / path.name).unlink, missing_ok=True)
                path.rename(output / path.name)
        else:
            folder.rename(output)
        on_error.pop_all()
    shutil.rmtree(earlier, ignore_errors=True)


def _earlier(output: Path) -> list[Path]:
    """Where results that were in OUT were moved to, by runs that did not come to an end."""
    return sorted(output.parent.glob(f".{glob.escape(output.name)}.*.earlier"))


def _put_back(earlier: Path, output: Path) -> None:
    """Move back what a run has moved out of OUT, where nothing has taken its place."""
    for path in earlier.iterdir():
        place = output if path.name == _WHOLE else output / path.name
        if not place.exists():
            path.rename(place)
    shutil.rmtree(earlier, ignore_errors=True)


def check_language_model(model: Any, name: str, remedy: str) -> None:
    """Refuse a model that has no perplexity."""
    if not predicts_next_token(model):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise CliError(f"{name} is a {type(base).__name__}, and perplexity is of causal language models only{remedy}.")


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A short greedy continuation of a text, with the text."""
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    generated = model.generate(**tokens, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def note_evaluation(model: PeftModel, figures: Mapping[str, float]) -> dict[str, float]:
    """Put figures into the config of a compressed model, which its card shows when it is saved; returns a copy of them.

    A config holds finite ones only, so that a model that is broken can still be saved, and looked at.
    """
    config_of(model, "default").evaluation = {name: value for name, value in figures.items() if math.isfinite(value)}
    return dict(figures)


def size_table(sizes: SizeReport) -> Table:
    """Parameters and bytes, of the targets and of the model, before and after."""
    table = Table("size", "before", "after", "kept")
    for part, unit, before, after, kept in sizes.rows():
        table.add_row(f"{part}, {unit}", f"{before:,}", f"{after:,}", f"{kept:.1%}")
    dense = len(sizes.dense_modules)
    table.caption = f"{len(sizes.matrices) - dense} matrices factorised, {dense} left dense"
    return table


def figures_table(figures: dict[str, Any]) -> Table:
    """Measures and their values."""
    table = Table("measure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    return table


# Tables go to stdout, what happens meanwhile to stderr, so that `--json` can be piped.
out, err = Console(markup=False, emoji=False), Console(markup=False, emoji=False, stderr=True)
