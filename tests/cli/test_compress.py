"""`reparam compress`: what it prints, writes and refuses, on tiny models saved to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.command_line import DATA_FREE, FILES, Run, assert_error, calibrated, quick
from support.models import byte_tokenizer, llama
from transformers import AutoModelForCausalLM

from reparam_peft import Statistics, perplexity, self_written, text_batches
from reparam_peft.cli import compress as compress_command
from reparam_peft.cli import inputs as sources
from reparam_peft.cli import search as search_command
from reparam_peft.cli import statistics_file


@pytest.mark.parametrize("method", ["default", "svd"])
def test_compress_prints_json_and_writes_what_can_be_loaded(run: Run, models: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "deep" / "out"
    by_method = calibrated(models)[:-1] if method == "default" else ["--method", method]
    result = run("compress", models / "llama", output, "--keep", 0.4, *by_method, *quick(models), "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    assert set(printed) == {"model", "output", "seconds", "keep", "size", "dense_modules", "evaluation", "sample"}
    assert (printed["model"], printed["output"]) == (str(models / "llama"), str(output))
    assert 0.3 < printed["keep"] <= 0.4
    assert printed["seconds"] >= 0
    assert set(printed["size"]) == {"targets", "model"}
    assert set(printed["sample"]) == {"dense", "compressed"}
    assert all(sample.startswith("The capital of France is") for sample in printed["sample"].values())

    assert {path.name for path in output.iterdir()} >= FILES
    assert [path.name for path in output.parent.iterdir()] == ["out"], "no temporary folder stays"
    tensors = load_file(output / "adapter_model.safetensors")
    targets = printed["size"]["targets"]
    dense = sum(64 * 160 if "mlp" in name else 64 * (32 if "k_proj" in name or "v_proj" in name else 64)
                for name in printed["dense_modules"])  # fmt: skip
    assert sum(tensor.numel() for tensor in tensors.values()) + dense == targets["stored_parameters"]
    assert sum(tensor.nbytes for tensor in tensors.values()) + 4 * dense == targets["stored_bytes"]

    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    text = (models / "text.txt").read_text()
    batches = text_batches(byte_tokenizer(), text, length=64, limit=4)
    figures = printed["evaluation"]
    assert set(figures) == {"dense perplexity", "perplexity"}
    assert perplexity(base, batches) == pytest.approx(figures["dense perplexity"], rel=1e-5)
    loaded = PeftModel.from_pretrained(base, output)
    assert perplexity(loaded, batches) == pytest.approx(figures["perplexity"], rel=1e-5)
    config = loaded.peft_config["default"]
    chosen = (config.method, config.allocation, config.form, config.calibration_tokens, config.gradient_tokens, config.seed)
    expected = {
        "default": ("whitened", "loss", "pivot", 4 * 64, 4 * 64, 0),
        "svd": ("svd", "uniform", "factors", None, None, None),
    }
    assert chosen == expected[method]
    assert (config.predicted_loss is None) == (method == "svd")
    card = (output / "README.md").read_text()
    assert f"| perplexity | {figures['perplexity']:.6g} |" in card
    assert f"| dense perplexity | {figures['dense perplexity']:.6g} |" in card
    assert str(models) not in card, "no path of this machine is published"
    assert f"| method | {config.method} |" in card
    assert ("| calibration tokens | 256 |" in card) == (method == "default")
    assert os.stat(output).st_mode & 0o777 == 0o755


def test_compress_prints_tables(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", tmp_path / "out", "--rank", "4", *calibrated(models)[:-1], *quick(models))
    assert result.code == 0
    for words in (
        "targets, parameters",
        "model, bytes",
        "14 matrices factorised, 0 left dense",
        "dense perplexity",
        "compressed:",
    ):
        assert words in result.out
    assert f"saved to {tmp_path / 'out'}" in result.out
    for words in ("calibrating", "measuring perplexity", "factorising", "loading it again"):
        assert words in result.err
    assert "measuring perplexity" not in result.out


def test_compress_without_evaluation(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("compress", models / "llama", output, *calibrated(models), "--json")
    assert result.code == 0
    assert set(json.loads(result.out)) == {"model", "output", "seconds", "keep", "size", "dense_modules"}
    assert "perplexity" not in (output / "README.md").read_text()
    assert "keep = 0.8" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "factorised"),
    [
        (["--rank", "full"], 14),
        (["--target-modules", "q_proj,k_proj"], 4),
        (["--target-modules", "mlp.up_proj"], 2),
        (["--target-modules", r".*layers\.0\.(self_attn|mlp)\..*_proj"], 7),
        (["--target-modules", "q_proj, up_proj", "--exclude-modules", r".*layers\.1\..*"], 2),
        (["--exclude-modules", "gate_proj,up_proj,down_proj"], 8),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compress_takes_targets_as_names_or_expressions(
    run: Run, models: Path, tmp_path: Path, options: list[str], factorised: int
) -> None:
    output = tmp_path / "out"
    assert run("compress", models / "llama", output, *DATA_FREE, *options).code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == factorised
    assert config["unreached"] is None


def test_compress_says_what_becomes_of_targets_that_no_text_reaches(run: Run, models: Path, tmp_path: Path) -> None:
    options = [*calibrated(models), "--target-modules", "q_proj,k_proj", "--rank", 8]
    assert run("compress", models / "llama", tmp_path / "out", *options, "--unreached", "dense").code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 4
    assert config["unreached"] == "dense"
    refused = run("compress", models / "llama", tmp_path / "other", *DATA_FREE, "--rank", 8, "--unreached", "dense")
    assert_error(refused, "`unreached` has an effect with calibration data only")


def test_compress_in_bfloat16_stores_bfloat16(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("compress", models / "llama", output, *calibrated(models), "--rank", 8, "--dtype", "bfloat16", "--json")
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".mask")} == {torch.bfloat16}
    size = json.loads(result.out)["size"]["targets"]
    assert size["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_model_without_a_language_head_is_compressed_without_evaluation_only(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["compress", models / "bert", output, *calibrated(models)]
    result = run(*arguments, "--evaluate")
    assert_error(
        result, "is a BertForSequenceClassification, and perplexity is of causal language models only; add --no-evaluate"
    )
    assert not output.exists()
    assert run(*arguments, "--keep", 0.5, "--target-modules", "query,value").code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) + len(config["dense_modules"]) == 4
    assert (config["method"], config["allocation"], config["form"]) == ("whitened", "loss", "pivot")
    assert config["moved_bias"] is True
    assert config["gradient_tokens"] == 4, "one label for each window"
    assert_error(run("evaluate", output), "perplexity is of causal language models only.$")


BAD_ARGUMENTS = {
    "both sizes": (["--keep", "0.5", "--rank", "4"], "--keep and --rank exclude each other; give one"),
    "rank is a word": (["--rank", "half"], "--rank must be a positive whole number or `full`, got 'half'"),
    "rank is negative": (["--rank", "-4"], "--rank must be a positive whole number or `full`, got '-4'"),
    "rank is a fraction": (["--rank", "4.5"], "--rank must be a positive whole number or `full`, got '4.5'"),
    "rank is a superscript": (["--rank", "²"], "--rank must be a positive whole number or `full`, got '²'"),
    "rank is zero": (["--rank", "0"], "`r` must be a positive int, 'full' or None, got 0"),
    "keep is too large": (["--keep", "1.5"], r"`keep` must be in \(0, 1\].* got 1.5"),
    "keep is zero": (["--keep", "0"], r"`keep` must be in \(0, 1\].* got 0"),
    "dtype": (["--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
    "device": (["--device", "abacus"], "abacus"),
    "no such targets": (["--target-modules", "qkv"], "qkv"),
    "expression": (["--target-modules", "(q_proj"], "`target_modules` holds .* not a valid regular expression"),
    "layer kind": (["--target-modules", "norm"], "norm: a LlamaRMSNorm cannot be factorised"),
    "no such text": (["--evaluate", "--text", "missing.txt"], "--text missing.txt: no such file"),
    "text is a folder": (["--evaluate", "--text", "."], r"--text \."),
    "method": (["--method", "qr"], "`method` must be one of 'svd', 'whitened', 'autoencoder' or None, got 'qr'"),
    "allocation": (["--allocation", "greedy"], "`allocation` must be one of 'uniform', 'loss' or None, got 'greedy'"),
    "form": (["--form", "qr"], "`form` must be one of 'factors', 'pivot', 'corrected' or None, got 'qr'"),
    "rank and allocation": (["--rank", "4", "--allocation", "loss"], "`r=4` fixes the ranks, .*; give one"),
    "no such calibration": (["--calibration", "missing.txt"], "--calibration missing.txt: no such file"),
    "svd with calibration": (["--method", "svd", "--calibration", "a.txt"], "--method svd uses no calibration; leave out"),
    "svd with text of its own": (["--method", "svd", "--self-written", "1"], "--method svd uses no calibration; leave out"),
    "a part of nothing": (["--self-written", "0.5"], "--self-written below 1 needs a text for the rest; add --calibration"),
    "windows too long": (["--length", "129"], "`length` must be at most 128, the positions that the model has, got 129"),
    "svd with statistics": (["--method", "svd", "--statistics", "s"], "--method svd uses no calibration; leave out"),
    "svd with a seed": (["--method", "svd", "--seed", "1"], "--method svd uses no calibration; leave out"),
    "no such plan": (["--plan", "missing.json"], "missing.json"),
    "plan and keep": (
        ["--plan", "p.json", "--keep", "0.5"],
        "--plan holds the ranks; leave out --keep, --rank, --allocation, --ceiling, --neurons, --budget and --bits",
    ),
    "plan and bits": (["--plan", "p.json", "--bits", "8"], "--plan holds the ranks; leave out"),
    "bits are words": (["--budget", "bytes", "--bits", "8,four"], "--bits must be whole numbers .* such as 8,4, got '8,four'"),
    "bits without effect": (["--bits", "8"], "`bits` has an effect with `budget='bytes'` or"),
    "no such budget": (["--budget", "watts"], "`budget` must be one of 'parameters', .* or None, got 'watts'"),
    "correction without a rank": (["--form", "corrected"], "`form='corrected'` needs `r`"),
    "plan and rank": (["--plan", "p.json", "--rank", "4"], "--plan holds the ranks; leave out"),
    "plan and allocation": (["--plan", "p.json", "--allocation", "loss"], "--plan holds the ranks; leave out"),
    "no folder for statistics": (["--statistics", "gone/s.safetensors"], "--statistics gone/s.safetensors: there is no folder"),
    "keep below the lowest ranks": (["--keep", "0.001"], "`keep=0.001` allows 86 parameters, .* Raise `keep`"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_compress_refuses_bad_arguments_in_one_line_and_writes_nothing(
    run: Run, models: Path, tmp_path: Path, name: str
) -> None:
    options, message = BAD_ARGUMENTS[name]
    default = ["--calibration-windows", 1, "--length", 64, *([] if "--evaluate" in options else ["--no-evaluate"])]
    assert_error(run("compress", models / "llama", tmp_path / "out", *default, *options), message)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_model_that_is_compressed_already(run: Run, models: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert run("compress", models / "llama", first, *DATA_FREE).code == 0
    result = run("compress", first, tmp_path / "second", "--no-evaluate")
    assert_error(result, "first is compressed already; give the model that it was made from")
    assert not (tmp_path / "second").exists()


def test_a_weight_with_nan_is_named_and_nothing_is_written(run: Run, models: Path, tmp_path: Path) -> None:
    for options in (DATA_FREE, calibrated(models)):
        result = run("compress", models / "damaged", tmp_path / "out", *options)
        assert_error(result, "layers.1.mlp.up_proj: `weight` contains NaN or infinite values; repair or exclude it")
    result = run("compress", models / "damaged", tmp_path / "out", "--method", "svd", *quick(models))
    assert_error(result, "the loss of batch 0 is nan")
    around = ["compress", models / "damaged", tmp_path / "out", "--exclude-modules", "up_proj", *calibrated(models)]
    assert_error(run(*around, "--self-written", 0), "layers.1.mlp.down_proj: its inputs hold NaN or infinite values in batch 0")
    assert_error(run(*around), "the model predicts NaN or infinite logits, from which no text can be drawn; check its weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "autoencoder", "--target-modules", "q_proj"], ("autoencoder", "loss", "pivot", 0)),
        (["--allocation", "uniform"], ("whitened", "uniform", "pivot", 0)),
        (["--method", "svd", "--allocation", "loss", "--seed", 5], ("svd", "loss", "pivot", 5)),
        (["--form", "factors", "--seed", 2], ("whitened", "loss", "factors", 2)),
        (["--rank", 8], ("whitened", "uniform", "pivot", 0)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_compress_takes_choices(run: Run, models: Path, tmp_path: Path, options: list[object], expected: tuple) -> None:
    output = tmp_path / "out"
    result = run("compress", models / "llama", output, *calibrated(models), *options)
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert tuple(config[name] for name in ("method", "allocation", "form", "seed")) == expected
    assert config["calibration_tokens"] == 4 * 64


def test_the_data_free_method_in_pivot_form(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("compress", models / "llama", tmp_path / "out", *DATA_FREE, "--form", "pivot").code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["method"], config["form"], config["calibration_tokens"]) == ("svd", "pivot", None)


def test_statistics_are_written_and_serve_another_keep(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "statistics.safetensors"
    known = ["--statistics", file, "--length", 64, "--no-evaluate"]
    first = run("compress", models / "llama", tmp_path / "first", *calibrated(models), "--statistics", file, "--seed", 3)
    assert first.code == 0, first.err
    assert "calibrating" in first.err
    statistics = Statistics.load(file)
    assert (statistics.tokens, statistics.gradient_tokens, statistics.seed) == (4 * 64, 4 * 64, 3)
    before = file.read_bytes()

    monkeypatch.setattr(statistics_file, "calibrate", lambda *args, **kwargs: pytest.fail("the statistics are there"))
    result = run("compress", models / "llama", tmp_path / "again", *known)
    assert result.code == 0, result.err
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert run("compress", models / "llama", tmp_path / "small", *known, "--keep", 0.4, "--target-modules", "up_proj").code == 0
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["stored_parameters"] <= 0.4 * config["dense_parameters"]
    assert (config["calibration_tokens"], config["seed"]) == (4 * 64, 3)
    assert run("plan", models / "llama", *known[:-1], "--keep", 0.5).code == 0
    assert file.read_bytes() == before


def test_statistics_that_are_refused(run: Run, models: Path, tmp_path: Path) -> None:
    file, arguments = tmp_path / "statistics.safetensors", ["compress", models / "llama", tmp_path / "out"]
    made = ["plan", models / "llama", *calibrated(models)[:-1], "--statistics", file, "--target-modules", "q_proj"]
    assert run(*made).code == 0
    known = ["--statistics", file, "--no-evaluate"]
    assert_error(run(*made), "exists and would be read in place of --calibration and --self-written; give one of the two")
    assert_error(run(*arguments, *known, "--seed", 1), "was made with --seed 0; leave out --seed, or name another file")
    result = run(*arguments, *known, "--target-modules", "v_proj")
    assert_error(result, "layers.0.self_attn.v_proj: the statistics do not hold this module")
    other = llama(vocab_size=259)
    other.model.layers[1].self_attn.q_proj.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    result = run("compress", tmp_path / "other", tmp_path / "out", *known, "--target-modules", "q_proj")
    assert_error(result, "layers.1.self_attn.q_proj: the statistics are of a weight of norm .*; they are of another model")
    save_file({"weight": torch.zeros(2)}, file)
    assert_error(run(*arguments, *known), "statistics.safetensors does not hold statistics")
    file.write_text("something else")
    assert_error(run(*arguments, *known), "statistics.safetensors is damaged")
    file.unlink()
    file.mkdir()
    assert_error(run(*arguments, *known), "statistics.safetensors cannot be read")
    assert not (tmp_path / "out").exists()


def test_the_model_writes_what_it_is_calibrated_on_and_is_measured_on_the_reference_text(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(model: object, *args: object, **kwargs: object) -> object:
            seen[name] = torch.cat([batch["input_ids"] for batch in args[-1]])
            return original(model, *args, **kwargs)

        return call

    monkeypatch.setattr(statistics_file, "calibrate", watch("calibrated", statistics_file.calibrate))
    monkeypatch.setattr(compress_command, "perplexity", watch("evaluated", compress_command.perplexity))
    monkeypatch.setattr(sources, "SET_ASIDE", 320)  # five windows of 64
    words = (models / "text.txt").read_text()
    monkeypatch.setattr(sources, "reference_text", lambda: words)
    arguments = ["--length", 64, "--windows", 3, "--target-modules", "q_proj", "--calibration-windows", 4]
    dense = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    batches = self_written(dense, byte_tokenizer(), 4, 64, seed=2, progress=False)
    written = torch.cat([batch["input_ids"] for batch in batches])
    windows = text_batches(byte_tokenizer(), words, length=64, limit=8, batch_size=8)[0]["input_ids"]
    result = run("compress", models / "llama", tmp_path / "alone", *arguments, "--seed", 2)
    assert result.code == 0, result.err
    assert torch.equal(seen["calibrated"], written)
    assert torch.equal(seen["evaluated"], windows[5:])


def test_compress_block_by_block_and_go_on_after_a_kill(run: Run, models: Path, tmp_path: Path) -> None:
    by_block = ["--sequential", "--refine", "--epochs", 2, "--run-folder", tmp_path / "run", "--offload-folder", tmp_path]
    arguments = [*calibrated(models), *by_block, "--statistics", tmp_path / "statistics.safetensors", "--keep", 0.5]
    assert run("compress", models / "llama", tmp_path / "one", *arguments).code == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["block"] for entry in log] == ["model.layers.0", "model.layers.1"]
    assert all(len(entry["epochs"]) == 2 for entry in log)
    (tmp_path / "run" / "block-0001.safetensors").unlink()
    assert run("compress", models / "llama", tmp_path / "two", *arguments).code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_compress_at_once_and_go_on_after_a_kill(run: Run, models: Path, tmp_path: Path) -> None:
    arguments = [*calibrated(models), "--keep", 0.5, "--run-folder", tmp_path / "run"]
    assert run("compress", models / "llama", tmp_path / "one", *arguments).code == 0
    (tmp_path / "run" / "block-0000.safetensors").unlink()
    (kept,) = (tmp_path / "run").glob("statistics-*.safetensors")
    written = kept.stat().st_mtime_ns
    assert run("compress", models / "llama", tmp_path / "two", *arguments).code == 0
    assert kept.stat().st_mtime_ns == written
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = run("compress", models / "llama", tmp_path / "three", *arguments, "--seed", 3)
    assert_error(other, "holds a run with another")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "svd", "--refine"], "--sequential and --refine need calibration"),
        (["--epochs", 2], "--epochs are those of --refine"),
        (["--run-folder", "x", "--method", "svd"], "--run-folder is for calibrated methods; leave out --method svd"),
    ],
)
def test_compress_refuses_options_without_effect(
    run: Run, models: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert_error(run("compress", models / "llama", tmp_path / "out", "--no-evaluate", *options), message)
    assert not (tmp_path / "out").exists()


def test_the_seed_reaches_what_is_random(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def stop(*_: object, **options: object) -> None:
        given.update(options)
        raise sources.CliError("enough")

    monkeypatch.setattr(compress_command, "compress_model", stop)
    monkeypatch.setattr(search_command, "find_smallest", stop)
    texts = calibrated(models)[:-1]
    refined = [*calibrated(models), "--refine", "--epochs", 2, "--seed", 5]
    assert_error(run("compress", models / "llama", tmp_path / "out", *refined), "enough")
    assert (given["refine"].seed, given["refine"].epochs, given["statistics"].seed) == (5, 2, 5)
    assert_error(run("search", models / "llama", tmp_path / "out", *texts, *quick(models), "--seed", 6), "enough")
    assert given["seed"] == 6
