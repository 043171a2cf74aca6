"""A folder of models and texts, and a call of the command line."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.command_line import Run
from support.models import bert, byte_tokenizer, llama

from reparam_peft.cli import app as cli


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, a BERT classifier, a damaged Llama, and two texts."""
    folder = tmp_path_factory.mktemp("models")
    model = llama(vocab_size=259)
    model.save_pretrained(folder / "llama")
    classifier = bert()
    classifier.resize_token_embeddings(259)
    classifier.save_pretrained(folder / "bert")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder / "damaged")
    for name in ("llama", "bert", "damaged"):
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    (folder / "calibration.txt").write_text("Pack my box with five dozen liquor jugs, please. " * 20, encoding="utf-8")
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Call `main` with arguments; gives exit code, stdout and stderr. What it sets for the process is put back."""

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["reparam", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capfd.readouterr())  # colours, where a CI forces them
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("REPARAM_DEBUG", raising=False)
    for name in ("TRANSFORMERS_VERBOSITY", "REPARAM_VERBOSITY"):
        monkeypatch.setenv(name, "")  # put back what `main` sets
    logger_class, verbosity = logging.getLoggerClass(), transformers.logging.get_verbosity()
    logger = logging.getLogger("reparam_peft")
    before = logger.level, logger.propagate, list(logger.handlers)
    with warnings.catch_warnings():
        yield call
    logging.setLoggerClass(logger_class)
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
