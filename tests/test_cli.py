"""`reparam` from its arguments to its exit code: what it prints, writes and refuses, on tiny models saved to disk."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_close, bert, byte_tokenizer, llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from reparam_peft import Plan, Record, ReparamConfig, Statistics, perplexity, text_batches
from reparam_peft.cli import app as cli
from reparam_peft.cli import compress as compress_command
from reparam_peft.cli import inputs as sources
from reparam_peft.cli import search as search_command
from reparam_peft.cli import statistics_file as preparation
from reparam_peft.cli.outputs import PROMPTS
from reparam_peft.searching import search as searching

Run = Callable[..., SimpleNamespace]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "reparam_run.json"}
FILES = {*ADAPTER, "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
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
    disabled, verbosity = logging.root.manager.disable, transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield call
    logging.disable(disabled)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def assert_error(result: SimpleNamespace, message: str) -> None:
    """Exit code 1, and the last words on stderr are one line, without a traceback, beginning with "error:"."""
    assert result.code == 1
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.err.endswith(lines[0] + "\n")
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.err


def quick(models: Path) -> list[object]:
    return ["--text", models / "text.txt", "--length", 64, "--windows", 4]


def calibrated(models: Path) -> list[object]:
    """Few and short windows to calibrate on, and no evaluation."""
    return ["--calibration", models / "calibration.txt", "--calibration-windows", 4, "--length", 64, "--no-evaluate"]


DATA_FREE = ["--method", "svd", "--no-evaluate"]


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
    assert f"| base model | {models / 'llama'} |" in card
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


def test_an_existing_folder_is_replaced_only_on_request(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: nothing to lose
    arguments = ["compress", models / "llama", output, *DATA_FREE]
    assert run(*arguments, "--rank", 4).code == 0
    (output / "mine.txt").write_text("mine")
    assert_error(run(*arguments, "--rank", 8), "out already exists; choose another folder or add --overwrite")
    assert (output / "mine.txt").exists()
    assert set(json.loads((output / "adapter_config.json").read_text())["rank_pattern"].values()) == {4}
    assert run(*arguments, "--rank", 8, "--overwrite").code == 0
    assert set(json.loads((output / "adapter_config.json").read_text())["rank_pattern"].values()) == {8}
    assert not (output / "mine.txt").exists()
    file = tmp_path / "file"
    file.write_text("mine")
    assert_error(run("compress", models / "llama", file, "--no-evaluate"), "file already exists")
    assert file.read_text() == "mine"


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
    "form": (["--form", "qr"], "`form` must be one of 'factors', 'pivot' or None, got 'qr'"),
    "rank and allocation": (["--rank", "4", "--allocation", "loss"], "`r=4` fixes the ranks, .*; give one"),
    "no such calibration": (["--calibration", "missing.txt"], "--calibration missing.txt: no such file"),
    "svd with calibration": (["--method", "svd", "--calibration", "a.txt"], "--method svd uses no calibration; leave out"),
    "svd with statistics": (["--method", "svd", "--statistics", "s"], "--method svd uses no calibration; leave out"),
    "svd with a seed": (["--method", "svd", "--seed", "1"], "--method svd uses no calibration; leave out"),
    "no such plan": (["--plan", "missing.json"], "missing.json"),
    "plan and keep": (
        ["--plan", "p.json", "--keep", "0.5"],
        "--plan holds the ranks; leave out --keep, --rank, --allocation and",
    ),
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
    default = ["--calibration-windows", 1, *([] if "--evaluate" in options else ["--no-evaluate"])]
    assert_error(run("compress", models / "llama", tmp_path / "out", *default, *options), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_refuses_what_is_no_model(run: Run, models: Path, tmp_path: Path, command: str) -> None:
    def call(model: object) -> SimpleNamespace:
        return run(command, model, *([tmp_path / "out"] if command == "compress" else []))

    assert_error(call(models / "text.txt"), "text.txt is a file; MODEL must be a folder, a Hub id or `demo`")
    assert_error(call("nobody/no-such-model"), "nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    assert_error(call(tmp_path / "empty"), "empty")
    assert not (tmp_path / "out").exists()


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
    result = run("compress", models / "damaged", tmp_path / "out", "--exclude-modules", "up_proj", *calibrated(models))
    assert_error(result, "layers.1.mlp.down_proj: its inputs hold NaN or infinite values in batch 0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [False, True])
def test_never_overwrites_the_model_that_it_compresses(run: Run, models: Path, tmp_path: Path, inside: bool) -> None:
    model = shutil.copytree(models / "llama", tmp_path / "folder" / "llama")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = run("compress", model, model.parent if inside else model, "--no-evaluate", "--overwrite")
    assert_error(result, "overwrite")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_replaces_only_an_earlier_result(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compress", models / "llama"]
    output = tmp_path / "out"
    for _ in range(2):
        assert run(*arguments, output, *DATA_FREE, "--overwrite").code == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    assert_error(run(*arguments, precious, "--overwrite"), "holds no compressed model but other files")
    assert_error(run(*arguments, precious / "thesis.txt", "--overwrite"), "is a file; OUT must be a folder")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    for place in (".", "..", "../.."):
        assert_error(run(*arguments, place, "--overwrite"), "is or holds the current folder")
    assert (precious / "thesis.txt").read_text() == "years"
    assert (output / "adapter_config.json").exists()


@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_damaged_and_incomplete_folders(run: Run, models: Path, tmp_path: Path, command: str) -> None:
    output = [tmp_path / "out"] if command == "compress" else []
    for name, damage in {
        "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
        "without weights": lambda folder: (folder / "model.safetensors").unlink(),
        "no JSON": lambda folder: (folder / "config.json").write_text("{"),
        "unknown architecture": lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
    }.items():
        folder = shutil.copytree(models / "llama", tmp_path / name)
        damage(folder)
        assert_error(run(command, folder, *output), "error: .")
        assert not (tmp_path / "out").exists()


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


def test_a_failure_while_writing_leaves_what_was_there(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = ["compress", models / "llama", output, *DATA_FREE]

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        assert_error(run(*arguments), "No space left on device")
        assert list(tmp_path.iterdir()) == []
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        (output / "adapter_config.json").write_text("{}")
        assert_error(run(*arguments, "--overwrite"), "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "model"],
        ["compress", "model", "out", "--keep", "much"],
        ["compress", "model", "out", "--length", "1"],
        ["compress", "model", "out", "--windows", "0"],
        ["compress", "model", "out", "--ratio", "0.5"],
        ["compress", "model", "out", "--calibration-windows", "0"],
        ["compress", "model", "out", "--seed", "-1"],
        ["plan"],
        ["plan", "model", "--no-evaluate"],
        ["evaluate"],
        ["distil", "model"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Usage: ")
    assert "Error" in result.err
    assert "Traceback" not in result.err


def test_help_lists_commands_and_options(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in ("compress", "plan", "evaluate"):
        assert command in result.out
    for option in ("--keep", "--rank", "--target-modules", "--calibration", "--statistics", "--plan", "--json", "--overwrite"):
        assert option in run("compress", "--help").out


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


def test_plan_prints_a_table_that_compress_carries_out(run: Run, models: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = [models / "llama", *calibrated(models)[:-1]]
    table = run("plan", *arguments, "--keep", 0.6, "--form", "factors", "--output", file)
    assert table.code == 0, table.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "nothing else is written"
    plan = Plan.load(file)
    assert table.out == f"{plan}\n"
    assert len(plan.modules) == 14
    assert (plan.keep, plan.method, plan.allocation, plan.form) == (0.6, "whitened", "loss", "factors")

    printed = json.loads(run("plan", *arguments, "--keep", 0.6, "--form", "factors", "--json").out)
    assert printed == json.loads(json.dumps(plan.to_dict()))

    result = run("compress", *arguments, output, "--no-evaluate", "--plan", file, "--json")
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["rank_pattern"] == plan.ranks
    assert set(config["dense_modules"]) == set(plan.dense_modules)
    assert (config["keep"], config["form"]) == (0.6, "factors")
    assert json.loads(result.out)["size"]["targets"]["stored_parameters"] == plan.stored_parameters


def test_a_plan_carries_its_method_too(run: Run, models: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = [models / "llama", *calibrated(models)[:-1], "--target-modules", "up_proj"]
    assert run("plan", *arguments, "--method", "svd", "--allocation", "loss", "--output", file).code == 0
    assert run("compress", *arguments, output, "--no-evaluate", "--plan", file).code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["method"], config["allocation"], config["rank_pattern"]) == ("svd", "loss", Plan.load(file).ranks)


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
    assert_error(wrong, "leave out --keep, --rank, --allocation and --ceiling")
    searched = ["search", models / "llama", tmp_path / "found", *calibrated(models)[:-1], *text[:2], *sizes[2:]]
    assert run(*searched, "--max-increase", "50%", "--max-trials", 2).code == 0
    assert ReparamConfig.from_pretrained(tmp_path / "found").smaller_keeps
    fixed = run("compress", models / "llama", tmp_path / "no", *calibrated(models), "--form", "factors", "--ceiling", 2)
    assert_error(fixed, "`ceiling` must be")
    assert_error(run("compress", models / "llama", tmp_path / "no", *DATA_FREE, "--ceiling", 0.9), "ceiling")


def test_search_finds_a_size_that_evaluate_confirms(run: Run, models: Path, tmp_path: Path) -> None:
    text = ["--calibration", models / "calibration.txt", "--text", models / "calibration.txt", "--length", 64, "--windows", 2]
    found = run(
        "search",
        models / "llama",
        tmp_path / "small",
        "--max-increase",
        "1%",
        *text,
        "--json",
        "--run-folder",
        tmp_path / "run",
    )
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["chosen"]["metric"] <= result["limit"] == pytest.approx(1.01 * result["dense_metric"])
    evaluated = run("evaluate", tmp_path / "small", *text[2:], "--json")
    assert json.loads(evaluated.out)["perplexity"] == pytest.approx(result["chosen"]["metric"], rel=1e-3)
    assert len((tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()) == len(result["trials"]) + 1
    again = run("search", models / "llama", tmp_path / "small", *text, "--overwrite", "--max-trials", 2)
    assert again.code == 0, again.err
    assert "perplexity at most" in again.out
    assert_error(run("search", models / "llama", tmp_path / "other", *text, "--max-increase", "much"), "`tolerance` must be")
    assert_error(
        run("search", models / "llama", tmp_path / "other", *text, "--methods", "autoencoder"), "cannot hold 'autoencoder'"
    )
    assert not (tmp_path / "other").exists()


def test_search_by_a_task_in_a_file(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"text": "Pack my box with five dozen"}\n')
    fields = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "task": "box"}
    fields |= {"test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    (tmp_path / "box.yaml").write_text(json.dumps({**fields, "metric_list": [{"metric": "bits_per_byte"}]}))
    options = ["--max-increase", "5%", "--max-trials", 3]
    command = ["search", models / "llama", tmp_path / "small", *calibrated(models)[:-1], *options]
    found = run(*command, "--metric", tmp_path / "box.yaml", "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["metric"] == "box:bits_per_byte"
    assert result["chosen"]["metric"] <= result["limit"] == pytest.approx(1.05 * result["dense_metric"])
    for module in (searching, preparation):
        monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated before the check"))
    wrong = run(*command, "--overwrite", "--metric", f"{tmp_path / 'box.yaml'}:acc")
    assert_error(wrong, "has no metric 'acc', only bits_per_byte")
    wrong = run(*command, "--overwrite", "--statistics", tmp_path / "new.safetensors", "--max-increase", "much")
    assert_error(wrong, "`tolerance` must be")


def test_report_shows_what_compress_and_search_did(run: Run, models: Path, tmp_path: Path) -> None:
    text = ["--calibration", models / "calibration.txt", "--text", models / "text.txt", "--length", "32"]
    searched = ["search", models / "llama", tmp_path / "found", *text, "--max-increase", "20%", "--max-trials", "3"]
    assert run(*searched).code == 0
    result = run("report", tmp_path / "found", "--length", "32", "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    page = Path(printed["report"]).read_text(encoding="utf-8")
    assert Path(printed["report"]) == tmp_path / "found" / "report" / "index.html"
    assert printed["speed"]["baseline"]["prefill_ms"] > 0
    record = Record.load(tmp_path / "found" / "report" / "record.json")
    assert record.model == str(models / "llama")
    assert len(record.search.trials) == 3
    assert {sample["prompt"] for sample in record.samples} == set(PROMPTS)
    assert all(sample["compressed"].startswith(sample["prompt"]) for sample in record.samples)
    assert "self_attn.q_proj" in record.angles
    assert f"{record.evaluation['perplexity']:.5g}" in page
    names = {path.stem for path in (tmp_path / "found" / "report").glob("*.png")}
    assert names == {"ranks", "spectra", "effective_ranks", "predictions", "search", "angles"}
    again = run("report", tmp_path / "found", "--no-measure", "--output", tmp_path / "elsewhere")
    assert again.code == 0, again.err
    assert "report written to" in again.out
    assert not (tmp_path / "elsewhere" / "angles.png").exists()


def test_report_of_blocks_and_of_what_has_no_record(run: Run, models: Path, tmp_path: Path) -> None:
    text = ["--calibration", models / "calibration.txt", "--length", "32", "--no-evaluate"]
    folder = ["--sequential", "--run-folder", tmp_path / "run"]
    assert run("compress", models / "llama", tmp_path / "small", *text, *folder).code == 0
    for source in ("run", "small"):
        assert run("report", tmp_path / source, "--no-measure", "--output", tmp_path / f"{source}-report").code == 0
        assert (tmp_path / f"{source}-report" / "blocks.png").exists()
    assert [entry["block"] for entry in Record.load(tmp_path / "small" / "reparam_run.json").blocks] == [
        "model.layers.0",
        "model.layers.1",
    ]
    again = run("compress", models / "llama", tmp_path / "again", *text, *folder)
    assert again.code == 0, again.err
    assert (
        Record.load(tmp_path / "again" / "reparam_run.json").plan == Record.load(tmp_path / "small" / "reparam_run.json").plan
    )
    (tmp_path / "small" / "reparam_run.json").unlink()
    assert_error(run("report", tmp_path / "small", "--no-measure"), "leave out --no-measure")
    assert run("report", tmp_path / "small", "--length", "32", "--text", models / "text.txt").code == 0
    assert "perplexity" in Record.load(tmp_path / "small" / "report" / "record.json").evaluation
    assert_error(run("report", models), "neither an adapter")
    assert_error(run("report", tmp_path / "missing"), "neither an adapter")
    assert_error(run("report", tmp_path / "run", "--dense", "demo"), "leave them out")
    assert_error(run("report", tmp_path / "run", "--no-measure", "--output", models), "no report")


def test_plans_that_are_refused(run: Run, models: Path, tmp_path: Path) -> None:
    file, arguments = tmp_path / "plan.json", [models / "llama", *calibrated(models)[:-1]]
    assert_error(run("plan", *arguments[:1], "--method", "svd"), "a plan needs calibration; leave out --method svd or add")
    result = run("plan", *arguments, "--output", tmp_path / "gone" / "plan.json")
    assert_error(result, "--output .*plan.json: there is no folder")
    assert "calibrating" not in result.err
    assert run("plan", *arguments, "--allocation", "uniform", "--target-modules", "q_proj", "--output", file).code == 0
    compress = ["compress", *arguments, tmp_path / "out", "--no-evaluate", "--plan", file]
    assert_error(run(*compress), "it is in the plan or among the targets, but not in both; the plan is of other targets")
    result = run(*compress, "--target-modules", "q_proj", "--form", "factors")
    assert_error(result, "`plan` is for `form='pivot'`, and the config says 'factors'")
    result = run("compress", *arguments[:1], tmp_path / "out", *DATA_FREE, "--plan", file)
    assert_error(result, "--plan is for calibrated methods; leave out --method svd")
    for text in ("{", "[]", "{}", '{"format": "reparam_peft plan 1"}'):
        file.write_text(text)
        assert_error(run(*compress), "plan.json does not hold a plan")
    assert not (tmp_path / "out").exists()


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

    monkeypatch.setattr(preparation, "calibrate", lambda *args, **kwargs: pytest.fail("the statistics are there"))
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
    assert_error(run(*made), "exists and would be read in place of --calibration; give one of the two")
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


def test_evaluation_takes_windows_that_calibration_did_not_see(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(model: object, *args: object, **kwargs: object) -> object:
            seen[name] = torch.cat([batch["input_ids"] for batch in args[-1]])
            return original(model, *args, **kwargs)

        return call

    monkeypatch.setattr(preparation, "calibrate", watch("calibrated", preparation.calibrate))
    monkeypatch.setattr(compress_command, "perplexity", watch("evaluated", compress_command.perplexity))
    file = tmp_path / "statistics.safetensors"
    options = ["--length", 64, "--windows", 3, "--target-modules", "q_proj", "--statistics", file]
    assert run("compress", models / "llama", tmp_path / "first", *options, "--calibration-windows", 5).code == 0
    windows = text_batches(byte_tokenizer(), sources.reference_text(), length=64, limit=8, batch_size=8)[0]["input_ids"]
    assert torch.equal(seen["calibrated"], windows[:5])
    assert torch.equal(seen["evaluated"], windows[5:])
    seen.clear()
    assert run("compress", models / "llama", tmp_path / "again", *options).code == 0, "the file says how much was seen"
    assert torch.equal(seen["evaluated"], windows[5:])
    assert "calibrated" not in seen
    assert run("compress", models / "llama", tmp_path / "svd", *options[:-2], "--method", "svd").code == 0
    assert torch.equal(seen["evaluated"], windows[:3]), "what needs no calibration is evaluated from the start"


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


def test_evaluate_by_default_on_what_of_the_reference_text_was_not_calibrated_on(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (models / "text.txt").read_text() + (models / "calibration.txt").read_text()
    monkeypatch.setattr(sources, "reference_text", lambda: words)
    monkeypatch.setattr(sources, "CALIBRATION_TOKENS", 128)  # two windows of 64
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


def test_a_traceback_on_request(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPARAM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["reparam", "evaluate", str(models / "text.txt")])
    with pytest.raises(sources.CliError, match="is a file"):
        cli.main()


def test_the_installed_command(models: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("reparam"), "compress", models / "bert", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


# Block by block, and healing


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "svd", "--refine"], "--sequential and --refine need calibration"),
        (["--epochs", 2], "--epochs are those of --refine"),
        (["--run-folder", "x"], "--run-folder and --offload-folder are for --sequential and --refine"),
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


# Export


@pytest.mark.parametrize("kind", ["standalone", "dense"])
def test_export(run: Run, models: Path, tmp_path: Path, kind: str) -> None:
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 4, "--method", "svd", "--no-evaluate").code == 0
    result = run("export", tmp_path / "small", tmp_path / "out", "--to", kind, "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert written["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "llama"), tmp_path / "small")
    assert one.num_parameters() < llama(vocab_size=259).num_parameters() or kind == "dense"
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert_close(one(tokens).logits, other(tokens).logits)
    evaluated = run("evaluate", tmp_path / "out", "--text", models / "calibration.txt", "--length", 64, "--json")
    assert json.loads(evaluated.out)["parameters"] == one.num_parameters()
    assert (tmp_path / "out/README.md").exists() == (kind == "standalone")


def test_export_quantises(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 24, "--method", "svd", "--no-evaluate").code == 0
    sizes = {}
    for bits in ("int8", "int4", None):
        options = ["--quantize", bits] if bits else []
        result = run("export", tmp_path / "small", tmp_path / f"out-{bits}", *options, "--json")
        assert result.code == 0, result.err
        written = json.loads(result.out)
        assert written["quantize"] == bits
        sizes[bits] = written["bytes"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{bits}")
        assert model(torch.arange(24).view(2, 12)).logits.isfinite().all()
        text = ["--text", models / "calibration.txt", "--length", 64, "--windows", 1]
        evaluated = json.loads(run("evaluate", tmp_path / f"out-{bits}", *text, "--json").out)
        assert 0.8 * written["bytes"] < evaluated["bytes"] <= written["bytes"]  # the file has a header
    assert sizes["int4"] < sizes["int8"] < sizes[None]
    out = tmp_path / "other"
    assert_error(run("export", tmp_path / "small", out, "--quantize", "int8", "--self-contained"), "not quantised")
    assert_error(run("export", tmp_path / "small", out, "--quantize", "int8", "--to", "dense"), "is for standalone checkpoints")
    assert not out.exists()


def test_export_to_onnx(run: Run, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers.exporters.runners", reason="ONNX files need transformers 5.23")
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 4, "--method", "svd", "--no-evaluate").code == 0
    result = run("export", tmp_path / "small", tmp_path / "out", "--to", "onnx", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.onnx*"))
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"prefill.onnx", "decode.onnx"}
    assert run("export", tmp_path / "small", tmp_path / "out", "--to", "onnx", "--overwrite").code == 0


def test_export_replaces_standalone_checkpoints_only(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 4, "--method", "svd", "--no-evaluate").code == 0
    assert run("export", tmp_path / "small", tmp_path / "out").code == 0
    assert_error(run("export", tmp_path / "small", tmp_path / "out"), "already exists")
    assert run("export", tmp_path / "small", tmp_path / "out", "--self-contained", "--overwrite").code == 0
    assert (tmp_path / "out/modeling_reparam.py").exists()
    assert run("export", tmp_path / "small", tmp_path / "out", "--overwrite").code == 0
    assert not (tmp_path / "out/modeling_reparam.py").exists()
    assert_error(run("export", tmp_path / "small", models / "llama", "--overwrite"), "holds no compressed model")
    assert_error(run("export", models / "llama", tmp_path / "other"), "is no compressed adapter")
    assert_error(
        run("export", tmp_path / "small", tmp_path / "other", "--to", "dense", "--self-contained"), "is for standalone"
    )
    assert_error(run("compress", tmp_path / "out", tmp_path / "other"), "is compressed already")
    assert not (tmp_path / "other").exists()
