"""What the command line writes: folders that are moved into place whole, and tables."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..runtime.modules import predicts_next_token
from ..standalone.checkpoint import METHOD
from ..tuner.model import config_of
from ..tuner.sizes import SizeReport
from .errors import CliError

PROMPTS = ("The capital of France is", "In the beginning of the twentieth century,", "def factorial(n):")


def check_output(output: Path, model: str, overwrite: bool) -> None:
    """Refuse, before any work, an OUT whose replacement would delete something else than an earlier result."""
    if output.exists() and (output.is_file() or any(output.iterdir())) and not overwrite:
        raise CliError(f"{output} already exists; choose another folder or add --overwrite.")
    if output.is_file():
        raise CliError(f"{output} is a file; OUT must be a folder.")
    if Path.cwd().is_relative_to(output):
        raise CliError(f"{output} is or holds the current folder; choose another folder.")
    if os.path.isdir(model) and Path(model).resolve().is_relative_to(output):
        raise CliError(f"{output} holds the model itself, which must not be overwritten; choose another folder.")
    if output.exists() and any(output.iterdir()) and not _is_compressed(output):
        raise CliError(f"{output} holds no compressed model but other files, which are not overwritten; choose another folder.")


def _is_compressed(folder: Path) -> bool:
    """Whether a folder holds an adapter or a standalone checkpoint."""
    if (folder / "adapter_config.json").exists():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "reparam_layers" in config or config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_whole(
    model: Any, tokenizer: PreTrainedTokenizerBase, output: Path, save: Callable[[Any, Path], None] | None = None
) -> None:
    """Write model and tokenizer beside `output` and move them there whole, so that nothing half-written stays.

    `save` writes the model; None: its own `save_pretrained`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder, aside = (Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent)) for _ in range(2))
    try:
        (save or type(model).save_pretrained)(model, folder)
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
