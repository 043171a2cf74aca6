"""Calibration statistics of a command: out of the file of an earlier run, or gathered on a text and written to the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.statistics import Statistics
from ..compression.compress import calibrate
from ..config.reparam_config import ReparamConfig
from ..numerics.methods import METHODS
from ..runtime.batches import split_rows
from .errors import CliError
from .inputs import read_batches
from .options import CalibrationOptions
from .outputs import err


@dataclass(frozen=True)
class Calibration:
    """What a command calibrates on, and where statistics are kept.

    Attributes:
        text: a file or a data set; None: the reference text.
        windows: the most windows of it.
        length: tokens in a window.
        file: of statistics, read if it exists, else written; None: they are not kept.
        seed: of the labels sampled for gradients; None: 0, or that of the file.
    """

    text: str | None
    windows: int
    length: int
    file: Path | None
    seed: int | None

    @classmethod
    def of(cls, options: CalibrationOptions, length: int, seed: int | None) -> Calibration:
        """What the options of a command say."""
        return cls(options.calibration, options.calibration_windows, length, options.statistics, seed)

    def earlier(self, config: ReparamConfig) -> Statistics | None:
        """Statistics of an earlier run; None where there are none. What cannot go together is refused.

        Raises:
            CliError: an option has no effect with the config, or beside the file; or the file cannot be read.
            ValueError: the file holds no statistics.
        """
        if is_data_free(config):
            if not (self.text is None and self.file is None and self.seed is None):
                raise CliError(
                    f"--method {config.method} uses no calibration; leave out --calibration, --statistics and --seed."
                )
            return None
        check_folder("--statistics", self.file)
        if self.file is None or not self.file.exists():
            return None
        if self.text is not None:
            raise CliError(f"{self.file} exists and would be read in place of --calibration; give one of the two.")
        try:
            statistics = Statistics.load(self.file)
        except OSError as error:
            raise CliError(f"{self.file} cannot be read: {error}") from error
        if self.seed not in (None, statistics.seed):
            raise CliError(
                f"{self.file} exists, and was made with --seed {statistics.seed}; leave out --seed, or name another file."
            )
        return statistics

    def gather(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: ReparamConfig) -> Statistics:
        """Statistics of the text, written to the file if one is named."""
        err.print("calibrating …")
        statistics = calibrate(model, config, self.batches(tokenizer), seed=self.seed or 0)
        if self.file is not None:
            statistics.save(self.file)
        return statistics

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """Windows of the text, in batches of two, since a backward pass needs more memory than a forward pass."""
        batches = read_batches(tokenizer, "--calibration", self.text, self.length, self.windows)
        return [dict(part) for batch in batches for part in split_rows(batch, 2)]


def uses_no_data(config: ReparamConfig) -> bool:
    """Whether the method that is asked for needs no data; one that is left open is a calibrated one."""
    return config.method is not None and not METHODS[config.method].needs_data


def is_data_free(config: ReparamConfig) -> bool:
    """Whether nothing of what is asked for needs calibration."""
    return uses_no_data(config) and config.allocation != "loss"


def check_folder(option: str, path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    if path is not None and not path.parent.is_dir():
        raise CliError(f"{option} {path}: there is no folder {path.parent}.")
