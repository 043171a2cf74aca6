"""`reparam heal`: it brings back what was lost, and says what it cannot do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import DATA_FREE, FILES, Run, assert_error, calibrated, quick
from support.models import byte_tokenizer, llama

from reparam_peft import text_batches
from reparam_peft.cli import compress as compress_command
from reparam_peft.cli.command_options import minutes_of
from reparam_peft.cli.errors import CliError


@pytest.fixture
def taught(models: Path, tmp_path: Path, run: Run) -> Path:
    """A Llama that knows its text, and what is left of it."""
    model, tokenizer = llama(vocab_size=259), byte_tokenizer()
    (batch,) = text_batches(tokenizer, (models / "calibration.txt").read_text(), length=64, batch_size=8, limit=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "taught")
    tokenizer.save_pretrained(tmp_path / "taught")
    result = run("compress", tmp_path / "taught", tmp_path / "small", "--keep", 0.2, "--no-neurons", *calibrated(models))
    assert result.code == 0, result.err
    return tmp_path


def test_heal_brings_back_what_was_lost(run: Run, models: Path, taught: Path) -> None:
    texts = ["--calibration", models / "calibration.txt", "--text", models / "calibration.txt", "--length", 64]
    arguments = [*texts, "--train-windows", 8, "--epochs", 12, "--learning-rate", 3e-3, "--run-folder", taught / "run"]
    result = run("heal", taught / "small", taught / "healed", *arguments, "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    found = printed["evaluation"]
    assert found["dense perplexity"] < found["perplexity"] < found["perplexity before"]
    assert printed["losses"][-1] < printed["losses"][0]
    assert {path.name for path in (taught / "healed").iterdir()} >= FILES
    evaluated = run("evaluate", taught / "healed", "--text", models / "calibration.txt", "--length", 64, "--json")
    assert json.loads(evaluated.out)["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)
    assert "perplexity before" in (taught / "healed" / "README.md").read_text()
    again = run("heal", taught / "small", taught / "again", *arguments)  # it has ended, and is taken up at its end
    assert again.code == 0, again.err
    assert "perplexity before" in again.out
    first, second = (load_file(taught / name / "adapter_model.safetensors") for name in ("healed", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_heal_refuses_what_it_cannot_do(run: Run, models: Path, taught: Path) -> None:
    assert_error(run("heal", models / "llama", taught / "out"), "is no compressed adapter; make one with `reparam compress`")
    assert_error(run("heal", taught / "small", taught / "small"), "already exists; choose another folder")
    assert_error(run("heal", taught / "small", taught / "small", "--overwrite"), "holds the model itself")
    bad = run("heal", taught / "small", taught / "out", "--distillation", 2, "--length", 64, *quick(models)[:2])
    assert_error(bad, r"`distillation` must be in \[0, 1\]")
    other = run("heal", taught / "small", taught / "out", "--teacher", models / "bert", "--length", 64, *quick(models)[:2])
    assert_error(other, "logits|labels|causal|next|vocabulary")
    assert not (taught / "out").exists()


@pytest.mark.parametrize(("time", "minutes"), [("90s", 1.5), ("30m", 30), ("1h", 60), (" 0.5h", 30)])
def test_times(time: str, minutes: float) -> None:
    assert minutes_of("--heal", time) == minutes


@pytest.mark.parametrize("time", ["", "30", "30 m", "m", "-3m", "0s", "1d", "1h30m", "infh", "nanm"])
def test_what_is_no_time_is_refused(time: str) -> None:
    with pytest.raises(CliError, match=r"--heal must be a time above zero in s, m or h, such as 90s, 30m or 1h, got"):
        minutes_of("--heal", time)


def test_heal_for_a_time(run: Run, models: Path, tmp_path: Path) -> None:
    """In the same command as compression: the healed model is what is saved and measured."""
    texts = [*calibrated(models)[:-1], *quick(models)[:2], "--windows", 2]
    options = ["--keep", 0.4, "--heal", "1s", "--run-folder", tmp_path / "run"]
    result = run("compress", models / "llama", tmp_path / "out", *texts, *options, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["evaluation"]["perplexity"] > 1
    record = json.loads((tmp_path / "out" / "reparam_run.json").read_text())
    assert record["losses"]
    assert list((tmp_path / "run" / "healing").glob("checkpoint-*"))
    few = ["--quantize", "int8"]
    again = run("heal", tmp_path / "out", tmp_path / "again", *texts[:2], *texts[4:], "--time", "1s", *few, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["losses"]
    names = ["dense perplexity", "perplexity before", "int8 perplexity before", "perplexity", "int8 perplexity"]
    found = json.loads(again.out)["evaluation"]
    assert list(found) == names
    assert 0 < abs(found["int8 perplexity"] / found["perplexity"] - 1) < 0.05
    assert run("export", tmp_path / "again", tmp_path / "stored", *few).code == 0
    evaluated = run("evaluate", tmp_path / "stored", *texts[4:], "--json")
    assert json.loads(evaluated.out)["perplexity"] == pytest.approx(found["int8 perplexity"], rel=1e-6)


def test_without_a_text_the_model_writes_what_it_is_healed_on(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_command, "HEALING_WRITTEN", 3)
    options = ["--calibration-windows", 2, "--length", 16, "--no-evaluate", "--heal", "1s", "--run-folder", tmp_path / "run"]
    result = run("compress", models / "llama", tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert "training on 3 windows" in result.err
    assert list((tmp_path / "run" / "healing_text").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("compress", ["--heal", "soon"], "--heal must be a time above zero"),
        ("compress", ["--heal", "1s", *DATA_FREE[:2]], "--heal goes on with the calibration text; leave out --method svd"),
        ("compress", ["--heal", "1s", "--offload-folder", "x"], "--offload-folder is for --sequential and --refine"),
        ("heal", ["--time", "5"], "--time must be a time above zero"),
        ("heal", ["--time", "5s", "--steps", 2], "--time says how long to train; leave out --epochs and --steps"),
    ],
)
def test_times_that_make_no_sense_are_refused_first(
    run: Run, models: Path, tmp_path: Path, command: str, options: list[object], message: str
) -> None:
    assert_error(run(command, models / "llama", tmp_path / "out", *options), message)


def test_healing_for_few_bits_is_refused_first(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run("heal", tmp_path / "small", tmp_path / "out", "--statistics", tmp_path / "statistics")
    assert_error(alone, "--statistics is for --quantize; give both or neither")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run("heal", tmp_path / "small", tmp_path / "out", "--quantize", "int4")
    assert_error(result, "quantised factors need bitsandbytes: pip install bitsandbytes")


def test_healing_needs_text_that_is_left(run: Run, models: Path, tmp_path: Path) -> None:
    texts = ["--calibration", models / "calibration.txt", "--calibration-windows", 10_000, *quick(models)]
    result = run("compress", models / "llama", tmp_path / "out", *texts, "--heal", "1s")
    assert_error(result, "no more than the 10000 windows that are calibrated or measured on; give --calibration another one")
