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
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config.fields import ALL_EXPERTS
from ..config.model_card import AUTO_CLASSES
from ..config.reparam_config import ReparamConfig
from ..evaluation.text import text_batches
from ..layers.factorized import FactorizedModule
from ..tuner.model import ReparamModel
from ..tuner.opening import experts_of
from .demo import demo_folder, reference_text
from .errors import CliError
from .options import TextOptions

SET_ASIDE = 48 * 512  # tokens of the reference text that no figure is measured on
DTYPES = ("auto", "float32", "bfloat16", "float16")


def take_experts(config: ReparamConfig, model: nn.Module, experts: bool | None) -> None:
    """Add the fused experts of a model to what a config takes, in place, if asked to; None: where there are any."""
    if experts or (experts is None and experts_of(model)):
        config.target_parameters = ALL_EXPERTS


def load_model(
    model: str, dtype: str, device: str | None, trainable: bool = False, keep: float | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A dense model or a compressed one, to be trained or not, whole or at a smaller size, on its device, and its tokenizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise CliError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}.")
    target = _device(device)
    source = str(demo_folder()) if model == "demo" else model
    if os.path.exists(source) and not os.path.isdir(source):
        raise CliError(f"{source} is a file; MODEL must be a folder, a Hub id or `demo`.")
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        if os.path.exists(os.path.join(source, "adapter_config.json")):
            loaded = _load_adapter(model, source, torch_dtype, trainable, keep)
        else:
            architectures = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or [""]
            named = getattr(transformers, architectures[0], None)
            loader = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
            if keep is not None:
                raise _no_smaller_size(model)
            code: dict[str, Any] = {"trust_remote_code": False} if loader is AutoModel else {}
            loaded = loader.from_pretrained(source, dtype=torch_dtype, **code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CliError(f"{model} cannot be loaded: {error}") from error
    return loaded.to(target).eval(), tokenizer


def load_dense(model: str, dtype: str, device: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model to compress, and its tokenizer."""
    loaded, tokenizer = load_model(model, dtype, device)
    if hasattr(loaded, "peft_config") or any(isinstance(module, FactorizedModule) for module in loaded.modules()):
        raise CliError(f"{model} is compressed already; give the model that it was made from.")
    return loaded, tokenizer


def load_compressed(
    model: str, dtype: str, device: str | None, trainable: bool = False, keep: float | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A compressed adapter on its base model, and its tokenizer."""
    loaded, tokenizer = load_model(model, dtype, device, trainable, keep)
    if not is_compressed(loaded):
        raise CliError(f"{model} is no compressed adapter; make one with `reparam compress`.")
    return loaded, tokenizer


def load_dense_of(adapter: str, dense: str | None, dtype: str, device: str | None) -> Any:
    """The dense model to compare an adapter with: the one named, or the one that it was made from."""
    loaded, _ = load_model(dense or PeftConfig.from_pretrained(adapter).base_model_name_or_path, dtype, device)
    return loaded


def is_compressed(model: Any) -> bool:
    """Whether a model has an adapter of this package."""
    return isinstance(getattr(model, "base_model", None), ReparamModel)


def held_out(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> list[dict[str, Tensor]]:
    """Windows to measure perplexity on: the first ones of a text that is named, later ones of the reference text.

    The first ones of that are set aside, for who wants to calibrate or train on some of it.
    """
    skip = _set_aside(options.length) if options.text is None else 0
    return read_batches(tokenizer, "--text", options.text, options.length, options.windows, skip)


def after_held_out(options: TextOptions) -> int:
    """Of how many windows the reference text, trained on, leaves out the first, so that none is trained and measured on."""
    return _set_aside(options.length) + options.windows if options.text is None else 0


def _set_aside(length: int) -> int:
    return math.ceil(SET_ASIDE / length)


def read_batches(
    tokenizer: PreTrainedTokenizerBase, option: str, text: str | None, length: int, windows: int, skip: int = 0
) -> list[dict[str, Tensor]]:
    """Windows of a file, of a Hub data set, or of the reference text; the first `skip` are left out."""
    batches = text_batches(tokenizer, _words(option, text), length=length, limit=windows + skip)
    rows = {key: torch.cat([batch[key] for batch in batches])[skip:] for key in batches[0]}
    if not len(rows["input_ids"]):
        used = "set aside" if option == "--text" else "calibrated or measured on"
        raise CliError(f"the text has no more than the {skip} windows that are {used}; give {option} another one.")
    return [{key: value[i : i + 4] for key, value in rows.items()} for i in range(0, len(rows["input_ids"]), 4)]


def _device(name: str | None) -> torch.device:
    """The device of this name, or the best there is, once it is known to hold a tensor."""
    try:
        device: torch.device = torch.device(name) if name else PartialState().default_device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CliError(f"--device {name}: {error}") from error
    return device


def _load_adapter(model: str, source: str, dtype: Any, trainable: bool, keep: float | None) -> Any:
    """The adapter in a folder, on its base model, with the head that its task has."""
    config = PeftConfig.from_pretrained(source)
    loader = getattr(peft, AUTO_CLASSES.get(config.task_type, "AutoPeftModel"))
    if keep is None:
        return loader.from_pretrained(source, dtype=dtype, is_trainable=trainable, **_code_of(loader))
    if not isinstance(config, ReparamConfig):
        raise _no_smaller_size(model)
    smaller = ReparamConfig.from_pretrained(source, keep=keep)
    return loader.from_pretrained(source, dtype=dtype, is_trainable=trainable, config=smaller, **_code_of(loader))


def _code_of(loader: Any) -> dict[str, bool]:
    """That no code of a base model is run; classes of transformers themselves, which have none, take no such argument."""
    return {} if loader is peft.AutoPeftModel else {"trust_remote_code": False}


def _no_smaller_size(model: str) -> CliError:
    return CliError(f"--keep is for adapters that `reparam compress` made; {model} is none. Leave it out.")


def _words(option: str, text: str | None) -> str:
    """A text, by the name of a file or of a Hub data set; None: the reference text."""
    if text is None:
        return reference_text()
    if os.path.isfile(text):
        return Path(text).read_text(encoding="utf-8")
    if os.path.exists(text) or text.endswith((".txt", ".md")):
        raise CliError(f"{option} {text}: no such file.")
    name, *rest = text.split(":")
    split = rest.pop() if rest else "train" if option == "--calibration" else "test"
    rows = load_dataset(name, *rest, split=split)
    try:
        return "\n\n".join(row["text"] for row in rows)
    except KeyError:
        raise CliError(f"{option} {text}: the data set has no column `text`.") from None
