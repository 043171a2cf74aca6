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
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import ReparamConfig
from .demo import demo_folder, reference_text
from .evaluation import text_batches
from .model_card import AUTO_CLASSES

CALIBRATION_TOKENS = 48 * 512  # 48 windows of 512 tokens


class CliError(Exception):
    """A mistake of the user or the environment, to be told in one line."""


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
