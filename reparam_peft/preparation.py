"""What `reparam compress`, `plan` and `search` begin with: the config, the dense model, and statistics of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .blocks import split_rows
from .compression import calibrate
from .config import ReparamConfig
from .products import FactorizedModule
from .sources import CliError, load_model, read_batches
from .statistics import Statistics


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
