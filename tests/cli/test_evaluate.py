"""`reparam evaluate`: dense models, adapters at their size and smaller, and what of a text is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from support.command_line import DATA_FREE, Run, assert_error, calibrated, quick
from support.models import byte_tokenizer
from transformers import AutoModelForCausalLM

from reparam_peft import Record, ReparamConfig, perplexity, text_batches
from reparam_peft.cli import inputs as sources


def test_a_damaged_checkpoint_is_refused(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("compress", models / "llama", output, *DATA_FREE).code == 0
    weights = output / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert_error(run("evaluate", output, *quick(models)), "adapter_model.safetensors is damaged")
    weights.write_bytes(whole)
    config = output / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert_error(run("evaluate", output, *quick(models)), "gone")


def test_an_adapter_of_another_method_is_evaluated_without_a_size_report(run: Run, models: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "llama"), LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path / "lora")
    byte_tokenizer().save_pretrained(tmp_path / "lora")
    result = run("evaluate", tmp_path / "lora", *quick(models), "--json")
    dense = json.loads(run("evaluate", models / "llama", *quick(models), "--json").out)
    assert result.code == 0, result.err
    assert json.loads(result.out)["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)


def test_one_adapter_for_many_sizes(run: Run, models: Path, tmp_path: Path) -> None:
    output, text = tmp_path / "large", quick(models)
    sizes = ["--keep", 1, "--form", "factors", "--ceiling", 0.999]
    result = run("compress", models / "llama", output, *calibrated(models), *sizes)
    assert result.code == 0, result.err
    whole, small = (json.loads(run("evaluate", output, *text, "--json", *keep).out) for keep in ([], ["--keep", 0.6]))
    assert small["size"]["targets"]["stored_parameters"] <= 0.6 * small["size"]["targets"]["dense_parameters"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "llama"), output, keep=0.6)
    batches = text_batches(byte_tokenizer(), (models / "text.txt").read_text(), length=64, limit=4)
    assert small["perplexity"] == pytest.approx(perplexity(loaded, batches), rel=1e-5)
    assert whole["parameters"] > small["parameters"]
    for command in ("export", "heal"):
        more = [*text, "--steps", 2, "--train-windows", 2] if command == "heal" else []
        made = run(command, output, tmp_path / command, "--keep", 0.6, *more)
        assert made.code == 0, made.err
        evaluated = json.loads(run("evaluate", tmp_path / command, *text, "--json").out)
        assert evaluated["parameters"] == small["parameters"]
        if command == "export":
            assert evaluated["perplexity"] == pytest.approx(small["perplexity"], rel=1e-5)
    assert Record.load(tmp_path / "heal" / "reparam_run.json").plan.keep <= 0.6
    assert_error(run("evaluate", output, *text, "--keep", 1.5), "`keep` must be a number in")
    assert_error(run("evaluate", models / "llama", *text, "--keep", 0.5), "--keep is for adapters that")
    ranks = tmp_path / "plan.json"
    assert run("plan", models / "llama", *calibrated(models)[:-1], *sizes[2:], "--keep", 0.9, "--output", ranks).code == 0
    assert run("compress", models / "llama", tmp_path / "planned", *calibrated(models), "--plan", ranks).code == 0
    assert run("evaluate", tmp_path / "planned", *text, "--keep", 0.5).code == 0
    wrong = run("compress", models / "llama", tmp_path / "no", *calibrated(models), "--plan", ranks, "--ceiling", 0.5)
    assert_error(wrong, "leave out --keep, --rank, --allocation, --ceiling, --neurons, --budget and --bits")
    searched = ["search", models / "llama", tmp_path / "found", *calibrated(models)[:-1], *text[:2], *sizes[2:]]
    assert run(*searched, "--max-increase", "50%", "--max-trials", 2).code == 0
    assert ReparamConfig.from_pretrained(tmp_path / "found").smaller_keeps
    fixed = run("compress", models / "llama", tmp_path / "no", *calibrated(models), "--form", "factors", "--ceiling", 2)
    assert_error(fixed, "`ceiling` must be")
    assert_error(run("compress", models / "llama", tmp_path / "no", *DATA_FREE, "--ceiling", 0.9), "ceiling")


def test_evaluate_a_dense_model(run: Run, models: Path) -> None:
    result = run("evaluate", models / "llama", *quick(models), "--json")
    assert result.code == 0
    printed = json.loads(result.out)
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batches = text_batches(byte_tokenizer(), (models / "text.txt").read_text(), length=64, limit=4)
    assert printed == {
        "model": str(models / "llama"),
        "perplexity": pytest.approx(perplexity(model, batches), rel=1e-5),
        "parameters": parameters,
        "bytes": 4 * parameters,
    }
    table = run("evaluate", models / "llama", *quick(models))
    assert table.code == 0
    assert f"{parameters:,}" in table.out


def test_evaluate_a_compressed_model(run: Run, models: Path, tmp_path: Path) -> None:
    arguments = ["compress", models / "llama", tmp_path / "out", "--keep", 0.4, *calibrated(models)[:-1], *quick(models)]
    compressed = run(*arguments, "--json")
    expected = json.loads(compressed.out)
    printed = json.loads(run("evaluate", tmp_path / "out", *quick(models), "--json").out)
    assert printed["perplexity"] == pytest.approx(expected["evaluation"]["perplexity"], rel=1e-5)
    assert printed["size"] == expected["size"]
    assert printed["parameters"] == expected["size"]["model"]["stored_parameters"]
    assert printed["bytes"] == expected["size"]["model"]["stored_bytes"]
    table = run("evaluate", tmp_path / "out", *quick(models))
    dense = len(expected["dense_modules"])
    assert f"{14 - dense} matrices factorised, {dense} left dense" in table.out


def test_evaluate_with_speed(run: Run, models: Path) -> None:
    result = run("evaluate", models / "llama", *quick(models), "--length", 16, "--speed", "--json")
    printed = json.loads(result.out)
    assert printed["prefill ms"] > 0
    assert printed["decode ms"] > 0
    assert run("evaluate", models / "llama", *quick(models), "--length", 16, "--speed").code == 0


def test_evaluate_by_default_on_the_same_windows_as_compress(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (models / "text.txt").read_text() + (models / "calibration.txt").read_text()
    monkeypatch.setattr(sources, "reference_text", lambda: words)
    monkeypatch.setattr(sources, "SET_ASIDE", 128)  # two windows of 64
    windows = text_batches(byte_tokenizer(), words, length=64, limit=20, batch_size=20)[0]["input_ids"]
    options = ["--length", 64, "--windows", 4, "--json"]
    dense = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    printed = json.loads(run("evaluate", models / "llama", *options).out)
    assert printed["perplexity"] == pytest.approx(perplexity(dense, [{"input_ids": windows[2:6]}]))
    made = run("compress", models / "llama", tmp_path / "small", *options, "--calibration-windows", 2)
    again = run("evaluate", tmp_path / "small", *options)
    assert json.loads(again.out)["perplexity"] == pytest.approx(json.loads(made.out)["evaluation"]["perplexity"], rel=1e-5)


def test_the_demo_model_is_a_folder_too(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "demo_folder", lambda: models / "llama")
    printed = json.loads(run("evaluate", "demo", *quick(models), "--json").out)
    assert printed["model"] == "demo"

    def fail() -> None:
        raise RuntimeError("the demo model could not be downloaded (no network)")

    monkeypatch.setattr(sources, "demo_folder", fail)
    assert_error(run("evaluate", "demo"), "the demo model could not be downloaded")
