"""What a command calibrates on: text, given or written by the model, or statistics, which a file keeps for other runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..calibration.self_written import BATCH_SIZE, SelfWritten, begin_and_ends
from ..calibration.statistics import Statistics
from ..compression.compress import calibrate
from ..config.reparam_config import ReparamConfig
from ..defaults import WINDOWS
from ..numerics.methods import METHODS
from ..runtime.batches import Batch, split_rows
from .errors import CliError
from .inputs import read_batches
from .options import SHARE, CalibrationOptions
from .outputs import err


@dataclass(frozen=True)
class Calibration:
    """What a command calibrates on, and where it is kept.

    Attributes:
        text: a file or a data set; None: the model writes all of it.
        share: part of the windows that the model writes itself; None: what the model can write says it.
        windows: how many windows at most.
        length: tokens in a window.
        file: of statistics, read if it exists, else written; None: they are not kept.
        seed: of the text that is written, and of the labels sampled for gradients; None: 0, or that of the file.
        folder: of the run, which keeps what the model has written; None: it is not kept.
    """

    text: str | None
    share: float | None
    windows: int
    length: int
    file: Path | None
    seed: int | None
    folder: Path | None

    @classmethod
    def of(cls, options: CalibrationOptions, length: int, seed: int | None, folder: Path | None = None) -> Calibration:
        """What the options of a command say.

        Raises:
            CliError: neither a text is given nor shall the model write one.
        """
        if options.calibration is None and options.self_written not in (None, 1):
            raise CliError("--self-written below 1 needs a text for the rest; add --calibration.")
        usual = WINDOWS if options.calibration is None else 2 * WINDOWS
        windows = usual if options.calibration_windows is None else options.calibration_windows
        return cls(options.calibration, options.self_written, windows, length, options.statistics, seed, folder)

    def earlier(self, config: ReparamConfig) -> Statistics | None:
        """Statistics of an earlier run; None where there are none. What cannot go together is refused.

        Raises:
            CliError: an option has no effect with the config, or beside the file; or the file cannot be read.
            ValueError: the file holds no statistics.
        """
        if is_data_free(config):
            if not (self.text is None and self.share is None and self.file is None and self.seed is None):
                raise CliError(
                    f"--method {config.method} uses no calibration; leave out --calibration, --self-written, --statistics and "
                    "--seed."
                )
            return None
        check_folder("--statistics", self.file)
        if self.file is None or not self.file.exists():
            return None
        if self.text is not None or self.share is not None:
            raise CliError(
                f"{self.file} exists and would be read in place of --calibration and --self-written; give one of the two."
            )
        statistics = load_statistics(self.file)
        if self.seed not in (None, statistics.seed):
            raise CliError(
                f"{self.file} exists, and was made with --seed {statistics.seed}; leave out --seed, or name another file."
            )
        return statistics

    def gather(self, model: Any, config: ReparamConfig, batches: Sequence[Batch] | SelfWritten) -> Statistics:
        """Statistics of batches, written to the file if one is named."""
        err.print("calibrating …")
        statistics = calibrate(model, config, batches, seed=self.seed or 0)
        if self.file is not None:
            statistics.save(self.file)
        return statistics

    def batches(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Sequence[Batch] | SelfWritten:
        """Windows of the text that is given, and windows that the model writes once they are needed.

        They come in small batches, since a backward pass needs more memory than a forward pass.

        Raises:
            CliError: the text cannot be read, or is needed since the model cannot write one.
            ValueError: as for `self_written`.
        """
        wanted = self._self_written(model, tokenizer)
        given: list[Batch] = []
        if wanted < self.windows:
            text = read_batches(tokenizer, "--calibration", self.text, self.length, self.windows - wanted)
            given = [part for batch in text for part in split_rows(batch, BATCH_SIZE)]
        if not wanted:
            return given
        return SelfWritten(model, tokenizer, wanted, self.length, self.seed or 0, True, self.folder, given)

    def _self_written(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many windows the model is to write."""
        try:
            begin_and_ends(model, tokenizer)
        except ValueError as error:
            if self.text is not None and not self.share:
                return 0
            raise CliError(f"{error} That is --calibration{', without --self-written' * bool(self.share)}.") from error
        share = self.share
        if share is None:
            share = 1 if self.text is None else SHARE
        wanted = round(share * self.windows)
        if self.text is not None and self.share and wanted in (0, self.windows):
            loser = "the model" if not wanted else self.text
            raise CliError(
                f"--self-written {share:g} of {self.windows} windows leaves none to {loser}; "
                "give another share or more windows, or leave out the one or the other."
            )
        return wanted


def uses_no_data(config: ReparamConfig) -> bool:
    """Whether the method that is asked for needs no data; one that is left open is a calibrated one."""
    return config.method is not None and not METHODS[config.method].needs_data


def is_data_free(config: ReparamConfig) -> bool:
    """Whether nothing of what is asked for needs calibration."""
    return uses_no_data(config) and config.allocation != "loss"


def load_statistics(path: Path) -> Statistics:
    """The statistics in a file.

    Raises:
        CliError: it cannot be read.
        ValueError: it holds no statistics.
    """
    try:
        return Statistics.load(path)
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error}") from error


def check_folder(option: str, path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    if path is not None and not path.parent.is_dir():
        raise CliError(f"{option} {path}: there is no folder {path.parent}.")
