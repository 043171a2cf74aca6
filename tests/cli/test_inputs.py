"""Models and texts that the command line reads: which loader, which windows, and one-line errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support.command_line import Run, assert_error
from support.models import bert, byte_tokenizer, llama
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM

from reparam_peft import ReparamConfig, text_batches
from reparam_peft.cli import inputs as sources
from reparam_peft.cli.errors import CliError
from reparam_peft.cli.inputs import after_held_out, held_out, load_model, read_batches
from reparam_peft.cli.options import TextOptions

WORDS = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """What loading sets for the process is put back."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, a BERT classifier, a BERT without head, an adapter of the first, and a text."""
    folder = tmp_path_factory.mktemp("models")
    llama(vocab_size=259).save_pretrained(folder / "llama")
    bert().save_pretrained(folder / "classifier")
    bert().bert.save_pretrained(folder / "encoder")
    config = ReparamConfig(target_modules=["q_proj"], keep=0.5, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(folder / "llama"), config).save_pretrained(folder / "adapter")
    for name in ("llama", "classifier", "encoder", "adapter"):
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(WORDS, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", LlamaForCausalLM),
        ("classifier", BertForSequenceClassification),
        ("encoder", BertModel),
        ("adapter", PeftModel),
    ],
)
def test_a_model_is_loaded_as_what_it_was_saved(models: Path, name: str, expected: type) -> None:
    model, tokenizer = load_model(str(models / name), "auto", "cpu")
    assert isinstance(model, expected)
    assert not model.training
    assert tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]


def test_a_model_is_loaded_in_the_dtype_asked_for(models: Path) -> None:
    model, _ = load_model(str(models / "llama"), "bfloat16", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(CliError, match="--dtype must be auto, float32, bfloat16 or float16, got 'int8'"):
        load_model(str(models / "llama"), "int8", "cpu")


def test_a_device_that_is_not_there(models: Path) -> None:
    with pytest.raises(CliError, match="--device nowhere: "):
        load_model(str(models / "llama"), "auto", "nowhere")


def test_an_architecture_that_is_no_model_is_loaded_without_a_head(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    model, _ = load_model(str(folder), "auto", "cpu")
    assert type(model).__name__ == "LlamaModel"


def test_what_is_no_model(models: Path, tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"text\.txt is a file; MODEL must be a folder, a Hub id or `demo`"):
        load_model(str(models / "text.txt"), "auto", "cpu")
    for name in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(CliError, match=f"{name} cannot be loaded: "):
            load_model(name, "auto", "cpu")


def test_the_demo_model_is_a_folder_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "demo_folder", lambda: models / "llama")
    model, _ = load_model("demo", "auto", "cpu")
    assert isinstance(model, LlamaForCausalLM)


def rows(batches: list[dict[str, Tensor]]) -> Tensor:
    assert all(torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"])) for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("skip", [0, 1, 4, 7])
def test_windows_of_a_file_after_those_that_are_skipped(models: Path, skip: int) -> None:
    batches = read_batches(byte_tokenizer(), "--text", str(models / "text.txt"), 64, 6, skip)
    whole = rows(text_batches(byte_tokenizer(), WORDS, length=64))
    assert torch.equal(rows(batches), whole[skip : skip + 6])
    assert all(len(batch["input_ids"]) <= 4 for batch in batches)


def test_the_reference_text_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "reference_text", lambda: WORDS)
    batches = read_batches(byte_tokenizer(), "--text", None, 64, 4)
    assert torch.equal(rows(batches), rows(text_batches(byte_tokenizer(), WORDS, length=64, limit=4)))
    with pytest.raises(CliError, match="the text has no more than the 14 windows that are set aside; give --text another"):
        read_batches(byte_tokenizer(), "--text", None, 64, 4, skip=14)


def test_none_of_the_reference_text_is_trained_and_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "reference_text", lambda: WORDS)
    monkeypatch.setattr(sources, "SET_ASIDE", 3 * 64)
    options = TextOptions(length=64, windows=4)
    whole = rows(text_batches(byte_tokenizer(), WORDS, length=64))
    assert torch.equal(rows(held_out(byte_tokenizer(), options)), whole[3:7])
    trained = read_batches(byte_tokenizer(), "--calibration", None, 64, 512, after_held_out(options))
    assert torch.equal(rows(trained), whole[7:])
    assert after_held_out(TextOptions(text="file.txt")) == 0


def test_texts_that_cannot_be_read(models: Path, tmp_path: Path) -> None:
    for option in ("--text", "--calibration"):
        for name in ("missing.txt", "missing.md", str(tmp_path)):
            with pytest.raises(CliError, match=f"{option} .*: no such file"):
                read_batches(byte_tokenizer(), option, name, 64, 4)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="`text` must hold at least one window of 63 tokens, got 5; use a smaller `length`"):
        read_batches(byte_tokenizer(), "--text", str(tmp_path / "short.txt"), 64, 4)


@pytest.mark.parametrize(
    ("option", "text", "called"),
    [
        ("--text", "org/data", ("org/data", "test")),
        ("--calibration", "org/data", ("org/data", "train")),
        ("--calibration", "org/data:validation", ("org/data", "validation")),
        ("--text", "org/data:config:train", ("org/data", "config", "train")),
    ],
)
def test_text_from_the_hub(monkeypatch: pytest.MonkeyPatch, option: str, text: str, called: tuple[str, ...]) -> None:
    calls = []

    def load(*names: str, split: str) -> list[dict[str, str]]:
        calls.append((*names, split))
        return [{"text": "some words " * 20}] * 3

    monkeypatch.setattr(sources, "load_dataset", load)
    batches = read_batches(byte_tokenizer(), option, text, 64, 4)
    assert calls == [called]
    joined = "\n\n".join(["some words " * 20] * 3)
    assert torch.equal(rows(batches), rows(text_batches(byte_tokenizer(), joined, length=64, limit=4)))


def test_a_data_set_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_dataset", lambda *names, split: [{"question": "?", "answer": "!"}])
    with pytest.raises(CliError, match="--text org/data: the data set has no column `text`"):
        read_batches(byte_tokenizer(), "--text", "org/data", 64, 4)


COMMANDS_WITH_A_MODEL = {
    "compress": ["{}", "out"],
    "plan": ["{}"],
    "evaluate": ["{}"],
    "search": ["{}", "out"],
    "heal": ["{}", "out"],
    "export": ["{}", "out"],
    "report": ["{}"],
}


@pytest.mark.parametrize("name", ["./missing", "../missing/model", "models/old/missing", "/nowhere/missing", "~missing/"])
@pytest.mark.parametrize("command", COMMANDS_WITH_A_MODEL)
def test_a_folder_that_is_not_there_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(command, *(word.format(name) for word in COMMANDS_WITH_A_MODEL[command]))
    assert_error(result, f"{Path(name).name}.*there is no such folder")
    assert "Repo id" not in result.err


def test_a_name_that_is_no_folder_may_be_of_the_hub(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_error(run("evaluate", "missing"), "missing cannot be loaded: there is no such folder, and of the Hub: ")


def test_other_models_and_texts_that_are_not_there_are_told(run: Run, models: Path, tmp_path: Path) -> None:
    adapter, text = models / "adapter", ["--text", models / "text.txt", "--length", 64]
    for command, option in (("heal", "--teacher"), ("report", "--dense")):
        out = [tmp_path / "out"] if command == "heal" else []
        assert_error(run(command, adapter, *out, option, "./gone", *text), r"\./gone cannot be loaded: there is no such folder")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    assert_error(run("evaluate", moved), "moved cannot be loaded: its base model was in /gone/base, and there is no such")
    for option in ("--text", "--calibration"):
        given = ["heal", adapter, tmp_path / "out", *text, option, "texts/of/mine.json"]
        assert_error(run(*given), f"{option} texts/of/mine.json: no such file, and no name of a data set of the Hub")
    assert_error(run("evaluate", adapter, "--text", "mine.json"), "--text mine.json: no such file, and of the Hub: ")
    assert_error(run("compress", models / "llama", tmp_path / "out", "--plan", "gone/plan.json"), "No such file.*plan.json")
    assert not (tmp_path / "out").exists()
