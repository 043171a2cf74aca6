"""What the command line reads: models and texts, by a folder's name, a Hub id, or `demo`."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from accelerate.state import PartialState
from datasets import load_dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import ReparamWarning
from ..config.fields import ALL_EXPERTS
from ..config.model_card import AUTO_CLASSES
from ..config.reparam_config import ReparamConfig
from ..evaluation.text import text_batches
from ..layers.factorized import FactorizedModule
from ..tuner.model import ReparamModel
from ..tuner.opening import experts_of
from .demo import demo_folder, reference_text
from .errors import CliError
from .noise import explained_errors, others_speak
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
    if not others_speak():
        transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise CliError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}.")
    target = _device(device)
    source = str(demo_folder()) if model == "demo" else model
    _check_source(source)
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with explained_errors():
            if os.path.exists(os.path.join(source, "adapter_config.json")):
                loaded = _load_adapter(model, source, torch_dtype, trainable, keep)
            else:
                loaded = _load_dense(model, source, torch_dtype, keep)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        missing = "" if os.path.isdir(source) else "there is no such folder, and of the Hub: "
        raise CliError(f"{model} cannot be loaded: {missing}{error}") from error
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


def _check_source(source: str) -> None:
    """Refuse what is neither a folder nor may be a Hub id, before a library calls it a Hub id of a wrong form."""
    if os.path.isdir(source):
        return
    if os.path.exists(source):
        raise CliError(f"{source} is a file; MODEL must be a folder, a Hub id or `demo`.")
    if not _may_be_hub_id(source):
        raise CliError(f"{source} cannot be loaded: there is no such folder, and it is no Hub id.")


def _may_be_hub_id(name: str) -> bool:
    """Whether a name has the form NAME or OWNER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load_dense(model: str, source: str, dtype: Any, keep: float | None) -> Any:
    """A model of transformers, with the head that it was saved with."""
    architectures = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or [""]
    named = getattr(transformers, architectures[0], None)
    loader = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
    if keep is not None:
        raise _no_smaller_size(model)
    code: dict[str, Any] = {"trust_remote_code": False} if loader is AutoModel else {}
    loaded, told = cast(Any, loader).from_pretrained(source, dtype=dtype, output_loading_info=True, **code)
    missing = sorted(told["missing_keys"])
    if missing:
        warnings.warn(
            f"{len(missing)} tensors are not in the files of {model} and are random numbers now, the first {missing[0]!r}.",
            ReparamWarning,
            stacklevel=2,
        )
    return loaded


def _load_adapter(model: str, source: str, dtype: Any, trainable: bool, keep: float | None) -> Any:
    """The adapter in a folder, on its base model, with the head that its task has."""
    config = PeftConfig.from_pretrained(source)
    base = config.base_model_name_or_path
    if base and not os.path.isdir(base) and not _may_be_hub_id(base):
        raise CliError(f"{model} cannot be loaded: its base model was in {base}, and there is no such folder.")
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
    if not _may_be_hub_id(name):
        raise CliError(f"{option} {text}: no such file, and no name of a data set of the Hub.")
    split = rest.pop() if rest else "train" if option == "--calibration" else "test"
    try:
        rows = load_dataset(name, *rest, split=split)
    except (OSError, ValueError) as error:
        raise CliError(f"{option} {text}: no such file, and of the Hub: {error}") from error
    try:
        return "\n\n".join(row["text"] for row in rows)
    except KeyError:
        raise CliError(f"{option} {text}: the data set has no column `text`.") from None
