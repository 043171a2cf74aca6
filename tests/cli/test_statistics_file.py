"""What commands calibrate on: given text, text that the model writes, and how much of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import bert, byte_tokenizer, llama

from reparam_peft import self_written, text_batches
from reparam_peft.calibration.self_written import SelfWritten
from reparam_peft.cli.errors import CliError
from reparam_peft.cli.options import CalibrationOptions
from reparam_peft.cli.statistics_file import Calibration
from reparam_peft.defaults import WINDOWS

TOKENIZER = byte_tokenizer()


def calibration(models: Path, text: bool = True, share: float | None = None, windows: int | None = 4) -> Calibration:
    named = str(models / "calibration.txt") if text else None
    return Calibration.of(CalibrationOptions(calibration=named, self_written=share, calibration_windows=windows), 64, seed=2)


@pytest.mark.parametrize(("share", "own"), [(None, 2), (0.0, 0), (0.75, 3)])
def test_text_that_is_given_and_text_that_the_model_writes(models: Path, share: float | None, own: int) -> None:
    model = llama()
    batches = list(calibration(models, share=share).batches(model, TOKENIZER))
    assert all(len(batch["input_ids"]) <= 2 for batch in batches)
    text = (models / "calibration.txt").read_text(encoding="utf-8")
    given = text_batches(TOKENIZER, text, length=64, limit=4, batch_size=4)[0]["input_ids"]
    written = self_written(model, TOKENIZER, 4, 64, seed=2, progress=False)[0]["input_ids"]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), torch.cat([given[: 4 - own], written[:own]]))


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_share_that_leaves_nothing_to_text_or_model_is_refused(models: Path, share: float) -> None:
    with pytest.raises(CliError, match="leaves none to"):
        calibration(models, share=share).batches(llama(), TOKENIZER)


def test_by_default_the_model_writes_as_much_beside_a_text_as_without_one(models: Path) -> None:
    alone, beside = (calibration(models, text, windows=None).batches(llama(), TOKENIZER) for text in (False, True))
    assert isinstance(alone, SelfWritten)
    assert isinstance(beside, SelfWritten)
    assert alone.windows == beside.windows == WINDOWS


def test_a_model_that_cannot_write_text_needs_some(models: Path) -> None:
    with pytest.raises(
        CliError, match=r"a BertForSequenceClassification cannot write text itself: .* That is --calibration\.$"
    ):
        calibration(models, text=False).batches(bert(), TOKENIZER)
    with pytest.raises(CliError, match=r"That is --calibration, without --self-written\.$"):
        calibration(models, share=0.5).batches(bert(), TOKENIZER)
    assert sum(len(batch["input_ids"]) for batch in calibration(models).batches(bert(), TOKENIZER)) == 4
