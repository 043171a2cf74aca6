"""`reparam heal`: it brings back what was lost, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import FILES, Run, assert_error, calibrated, quick
from support.models import byte_tokenizer, llama

from reparam_peft import text_batches


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
    result = run("compress", tmp_path / "taught", tmp_path / "small", "--keep", 0.2, *calibrated(models))
    assert result.code == 0, result.err
    return tmp_path


def test_heal_brings_back_what_was_lost(run: Run, models: Path, taught: Path) -> None:
    texts = ["--calibration", models / "calibration.txt", "--text", models / "calibration.txt", "--length", 64]
    arguments = [*texts, "--train-windows", 8, "--epochs", 30, "--learning-rate", 3e-3, "--run-folder", taught / "run"]
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
