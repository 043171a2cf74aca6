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
from conftest import bert, byte_tokenizer, llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from reparam_peft import cli, perplexity, text_batches

Run = Callable[..., SimpleNamespace]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, a BERT classifier, a damaged Llama, a text, and the Llama compressed to 40 %."""
    folder = tmp_path_factory.mktemp("models")
    model = llama(vocab_size=259)
    model.save_pretrained(folder / "llama")
    bert().save_pretrained(folder / "bert")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder / "damaged")
    for name in ("llama", "bert", "damaged"):
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
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


def test_compress_prints_json_and_writes_what_can_be_loaded(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    result = run("compress", models / "llama", output, "--keep", 0.4, *quick(models), "--json")
    assert result.code == 0
    printed = json.loads(result.out)
    assert set(printed) == {"model", "output", "seconds", "keep", "size", "dense_modules", "evaluation", "sample"}
    assert (printed["model"], printed["output"]) == (str(models / "llama"), str(output))
    assert 0.3 < printed["keep"] <= 0.4
    assert printed["seconds"] >= 0
    assert printed["dense_modules"] == []
    assert set(printed["size"]) == {"targets", "model"}
    assert set(printed["sample"]) == {"dense", "compressed"}
    assert all(sample.startswith("The capital of France is") for sample in printed["sample"].values())

    assert {path.name for path in output.iterdir()} >= FILES
    assert [path.name for path in output.parent.iterdir()] == ["out"], "no temporary folder stays"
    with safe_open(output / "adapter_model.safetensors", framework="pt") as file:
        stored = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in list(file.keys()))
    assert stored == printed["size"]["targets"]["stored_parameters"]

    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    text = (models / "text.txt").read_text()
    batches = text_batches(byte_tokenizer(), text, length=64, limit=4)
    figures = printed["evaluation"]
    assert set(figures) == {"dense perplexity", "perplexity"}
    assert perplexity(base, batches) == pytest.approx(figures["dense perplexity"], rel=1e-5)
    loaded = PeftModel.from_pretrained(base, output)
    assert perplexity(loaded, batches) == pytest.approx(figures["perplexity"], rel=1e-5)
    card = (output / "README.md").read_text()
    assert f"| perplexity | {figures['perplexity']:.6g} |" in card
    assert f"| dense perplexity | {figures['dense perplexity']:.6g} |" in card
    assert f"| base model | {models / 'llama'} |" in card
    assert os.stat(output).st_mode & 0o777 == 0o755


def test_compress_prints_tables(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", tmp_path / "out", "--rank", "4", *quick(models))
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
    assert "measuring perplexity" in result.err
    assert "measuring perplexity" not in result.out


def test_compress_without_evaluation(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("compress", models / "llama", output, "--no-evaluate", "--json")
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
    assert run("compress", models / "llama", output, "--no-evaluate", *options).code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == factorised


def test_compress_in_bfloat16_stores_bfloat16(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", tmp_path / "out", "--no-evaluate", "--dtype", "bfloat16", "--json")
    size = json.loads(result.out)["size"]["targets"]
    assert size["stored_bytes"] == 2 * size["stored_parameters"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {torch.bfloat16}


def test_a_model_without_a_language_head_is_compressed_without_evaluation_only(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("compress", models / "bert", output)
    assert_error(
        result, "is a BertForSequenceClassification, and perplexity is of causal language models only; add --no-evaluate"
    )
    assert not output.exists()
    assert run("compress", models / "bert", output, "--no-evaluate", "--rank", 8, "--target-modules", "query,value").code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 4
    assert_error(run("evaluate", output), "perplexity is of causal language models only.$")


def test_an_existing_folder_is_replaced_only_on_request(run: Run, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: nothing to lose
    arguments = ["compress", models / "llama", output, "--no-evaluate"]
    assert run(*arguments, "--rank", 4).code == 0
    (output / "mine.txt").write_text("mine")
    assert_error(run(*arguments, "--rank", 8), "out already exists; choose another folder or add --overwrite")
    assert (output / "mine.txt").exists()
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4
    assert run(*arguments, "--rank", 8, "--overwrite").code == 0
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 8
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
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_compress_refuses_bad_arguments_in_one_line_and_writes_nothing(
    run: Run, models: Path, tmp_path: Path, name: str
) -> None:
    options, message = BAD_ARGUMENTS[name]
    default = [] if "--evaluate" in options else ["--no-evaluate"]
    assert_error(run("compress", models / "llama", tmp_path / "out", *default, *options), message)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(run: Run, models: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short")
    result = run("evaluate", models / "llama", "--text", text, "--length", 64)
    assert_error(result, "`text` must hold at least one window of 63 tokens, got 5; use a smaller `length`")


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
    assert run("compress", models / "llama", first, "--no-evaluate").code == 0
    result = run("compress", first, tmp_path / "second", "--no-evaluate")
    assert_error(result, "first is compressed already; give the model that it was made from")
    assert not (tmp_path / "second").exists()


def test_a_weight_with_nan_is_named_and_nothing_is_written(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "damaged", tmp_path / "out", "--no-evaluate")
    assert_error(result, "layers.1.mlp.up_proj: `weight` contains NaN or infinite values; repair or exclude it")
    assert_error(run("compress", models / "damaged", tmp_path / "out", *quick(models)), "the loss of batch 0 is nan")
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
        assert run(*arguments, output, "--no-evaluate", "--overwrite").code == 0
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


def test_a_device_that_is_not_there_and_an_architecture_that_is_no_model(run: Run, models: Path, tmp_path: Path) -> None:
    assert_error(run("evaluate", models / "llama", "--device", "nowhere"), "--device nowhere")
    folder = shutil.copytree(models / "llama", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    assert_error(run("evaluate", folder), "perplexity is of causal language models only")


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
    assert run("compress", models / "llama", output, "--no-evaluate").code == 0
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


def test_a_data_set_without_text(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_dataset", lambda *names, split: [{"question": "?", "answer": "!"}])
    assert_error(run("evaluate", models / "llama", "--text", "org/data"), "text")


def test_a_failure_while_writing_leaves_what_was_there(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = ["compress", models / "llama", output, "--no-evaluate"]

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
    assert "compress" in result.out
    assert "evaluate" in result.out
    for option in ("--keep", "--rank", "--target-modules", "--json", "--overwrite"):
        assert option in run("compress", "--help").out


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
    compressed = run("compress", models / "llama", tmp_path / "out", "--keep", 0.4, *quick(models), "--json")
    expected = json.loads(compressed.out)
    printed = json.loads(run("evaluate", tmp_path / "out", *quick(models), "--json").out)
    assert printed["perplexity"] == pytest.approx(expected["evaluation"]["perplexity"], rel=1e-5)
    assert printed["size"] == expected["size"]
    assert printed["parameters"] == expected["size"]["model"]["stored_parameters"]
    assert printed["bytes"] == expected["size"]["model"]["stored_bytes"]
    table = run("evaluate", tmp_path / "out", *quick(models))
    assert "14 matrices factorised, 0 left dense" in table.out


def test_evaluate_with_speed(run: Run, models: Path) -> None:
    result = run("evaluate", models / "llama", *quick(models), "--length", 16, "--speed", "--json")
    printed = json.loads(result.out)
    assert printed["prefill ms"] > 0
    assert printed["decode ms"] > 0
    assert run("evaluate", models / "llama", *quick(models), "--length", 16, "--speed").code == 0


def test_evaluate_by_default_on_the_reference_text(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "reference_text", lambda: (models / "text.txt").read_text())
    options = ["--length", 64, "--windows", 4, "--json"]
    given_, default = run("evaluate", models / "llama", *quick(models), "--json"), run("evaluate", models / "llama", *options)
    assert json.loads(default.out) == json.loads(given_.out)


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("org/data", ("org/data", "test")),
        ("org/data:config:train", ("org/data", "config", "train")),
    ],
)
def test_text_from_the_hub(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, text: str, called: tuple[str, ...]) -> None:
    calls = []

    def load(*names: str, split: str) -> list[dict[str, str]]:
        calls.append((*names, split))
        return [{"text": "some words " * 20}] * 3

    monkeypatch.setattr(cli, "load_dataset", load)
    assert run("evaluate", models / "llama", "--text", text, "--length", 64).code == 0
    assert calls == [called]


def test_the_demo_model_is_a_folder_too(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "demo_folder", lambda: models / "llama")
    printed = json.loads(run("evaluate", "demo", *quick(models), "--json").out)
    assert printed["model"] == "demo"

    def fail() -> None:
        raise RuntimeError("the demo model could not be downloaded (no network)")

    monkeypatch.setattr(cli, "demo_folder", fail)
    assert_error(run("evaluate", "demo"), "the demo model could not be downloaded")


def test_a_traceback_on_request(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPARAM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["reparam", "evaluate", str(models / "text.txt")])
    with pytest.raises(cli.CliError, match="is a file"):
        cli.main()


def test_the_installed_command(models: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("reparam"), "compress", models / "bert", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
