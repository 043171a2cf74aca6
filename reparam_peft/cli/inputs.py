"""What the command line reads: models and texts, by a folder's name, a Hub id, or `demo`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate.state import PartialState
from datasets import load_dataset
from peft import PeftConfig
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.statistics import Statistics
from ..compression.compress import calibrate
from ..config.model_card import AUTO_CLASSES
from ..config.reparam_config import ReparamConfig
from ..evaluation.text import text_batches
from ..layers.factorized import FactorizedModule
from ..runtime.batches import split_rows
from .demo import demo_folder, reference_text
from .errors import CliError

CALIBRATION_TOKENS = 48 * 512  # 48 windows of 512 tokens


def load_model(
    model: str, dtype: str, device: str | None, trainable: bool = False, keep: float | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A dense model or a compressed one, to be trained or not, whole or at a smaller size, on its device, and its tokenizer."""
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
    options: dict[str, Any] = {}
    try:
        if os.path.exists(os.path.join(source, "adapter_config.json")):
            config = PeftConfig.from_pretrained(source)
            loader = getattr(peft, AUTO_CLASSES.get(config.task_type, "AutoPeftModel"))
            options = {"is_trainable": trainable}
            if keep is not None and isinstance(config, ReparamConfig):
                options["config"], keep = ReparamConfig.from_pretrained(source, keep=keep), None
        else:
            architectures = AutoConfig.from_pretrained(source).architectures or [""]
            named = getattr(transformers, architectures[0], None)
            loader = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
        if keep is not None:
            raise CliError(f"--keep is for adapters that `reparam compress` made; {model} is none. Leave it out.")
        loaded = loader.from_pretrained(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CliError(f"{model} cannot be loaded: {error}") from error
    return loaded.to(target).eval(), tokenizer


def calibrated_windows(length: int) -> int:
    """How many windows of the reference text `reparam compress` calibrates on by itself."""
    return math.ceil(CALIBRATION_TOKENS / length)


def read_batches(
    tokenizer: PreTrainedTokenizerBase, option: str, text: str | None, length: int, windows: int, skip: int = 0
) -> list[dict[str, Tensor]]:
    """Windows of a file, of a Hub data set, or of the reference text; the first `skip` are left out."""
    if text is None:
        words = reference_text()
    elif os.path.isfile(text):
        words = Path(text).read_text(encoding="utf-8")
    elif os.path.exists(text) or text.endswith((".txt", ".md")):
        raise CliError(f"{option} {text}: no such file.")
    else:
        name, *rest = text.split(":")
        split = rest.pop() if rest else "train" if option == "--calibration" else "test"
        rows = load_dataset(name, *rest, split=split)
        try:
            words = "\n\n".join(row["text"] for row in rows)
        except KeyError:
            raise CliError(f"{option} {text}: the data set has no column `text`.") from None
    batches = text_batches(tokenizer, words, length=length, limit=windows + skip)
    rows = {key: torch.cat([batch[key] for batch in batches])[skip:] for key in batches[0]}
    if not len(rows["input_ids"]):
        raise CliError(f"the text has no more than the {skip} windows that are calibrated on; give --text another one.")
    return [{key: value[i : i + 4] for key, value in rows.items()} for i in range(0, len(rows["input_ids"]), 4)]


def config_of(
    keep: float | None,
    rank: str | None,
    target_modules: str,
    exclude_modules: str | None,
    method: str | None,
    allocation: str | None,
    form: str | None,
    ceiling: float | None,
) -> ReparamConfig:
    """The config of `compress`, `plan` and `search`, its values checked."""
    if keep is not None and rank is not None:
        raise CliError("--keep and --rank exclude each other; give one.")
    options: dict[str, Any] = {"target_modules": _names(target_modules)}
    if exclude_modules is not None:
        options["exclude_modules"] = _names(exclude_modules)
    if keep is not None:
        options["keep"] = keep
    if rank is not None:
        if rank != "full" and not rank.isdecimal():
            raise CliError(f"--rank must be a positive whole number or `full`, got {rank!r}.")
        options["r"] = rank if rank == "full" else int(rank)
    return ReparamConfig(**options, method=method, allocation=allocation, form=form, ceiling=ceiling)


def is_data_free(config: ReparamConfig) -> bool:
    """Whether nothing of what is asked for needs calibration."""
    return config.method == "svd" and config.allocation != "loss"


def read_statistics(config: ReparamConfig, text: str | None, path: Path | None, seed: int | None) -> Statistics | None:
    """Statistics of an earlier run; None where there are none. What cannot go together is refused."""
    if is_data_free(config):
        if not (text is None and path is None and seed is None):
            raise CliError("--method svd uses no calibration; leave out --calibration, --statistics and --seed.")
        return None
    check_folder("--statistics", path)
    if path is None or not path.exists():
        return None
    if text is not None:
        raise CliError(f"{path} exists and would be read in place of --calibration; give one of the two.")
    try:
        known = Statistics.load(path)
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error}") from error
    if seed not in (None, known.seed):
        raise CliError(f"{path} exists, and was made with --seed {known.seed}; leave out --seed, or name another file.")
    return known


def calibrated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: ReparamConfig,
    text: str | None,
    length: int,
    windows: int,
    path: Path | None,
    seed: int | None,
) -> Statistics:
    """Statistics of a text, written to a file if one is named."""
    Console(stderr=True).print("calibrating …")
    known = calibrate(model, config, calibration_batches(tokenizer, text, length, windows), seed=seed or 0)
    if path is not None:
        known.save(path)
    return known


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, text: str | None, length: int, windows: int
) -> list[dict[str, Tensor]]:
    """Windows of a text, in batches of two, since a backward pass needs more memory than a forward pass."""
    return [part for batch in read_batches(tokenizer, "--calibration", text, length, windows) for part in split_rows(batch, 2)]


def check_folder(option: str, path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    if path is not None and not path.parent.is_dir():
        raise CliError(f"{option} {path}: there is no folder {path.parent}.")


def _names(value: str) -> str | list[str]:
    """Name endings where the value is a list of words, else a regular expression (or `all-linear`)."""
    words = value.split(",")
    plain = all(word.strip().replace("_", "").replace(".", "").isalnum() for word in words)
    return [word.strip() for word in words] if plain and value != "all-linear" else value


def load_dense(model: str, dtype: str, device: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model to compress, and its tokenizer."""
    loaded, tokenizer = load_model(model, dtype, device)
    if hasattr(loaded, "peft_config") or any(isinstance(module, FactorizedModule) for module in loaded.modules()):
        raise CliError(f"{model} is compressed already; give the model that it was made from.")
    return loaded, tokenizer
