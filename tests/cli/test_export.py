"""`reparam export`: standalone, dense, quantised and ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.command_line import Run, assert_error
from support.models import llama
from support.tolerances import assert_close
from support.versions import unless
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from reparam_peft.cli import export as export_command


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


@unless("torchao", "0.17", "has no tables in 8 bits")
def test_export_quantises_tables(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 24, "--method", "svd", "--no-evaluate").code == 0
    result = run("export", tmp_path / "small", tmp_path / "out", "--quantize-tables", "int8", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["quantize_tables"] == "int8"
    assert load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"].dtype == torch.int8


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
    assert_error(
        run("export", tmp_path / "small", out, "--quantize-tables", "int8", "--to", "dense"), "--quantize-tables is for"
    )
    tables = ("--quantize-tables", "int8", "--self-contained")
    assert_error(run("export", tmp_path / "small", out, *tables), "without quantised tables")
    assert_error(run("export", tmp_path / "small", out, "--statistics", tmp_path / "none"), "--statistics is for --quantize")
    missing = ("--quantize", "int4", "--statistics", tmp_path / "none")
    assert_error(run("export", tmp_path / "small", out, *missing), "none")
    text = ("--calibration", models / "calibration.txt", "--calibration-windows", 4, "--statistics", tmp_path / "statistics")
    assert run("compress", models / "llama", tmp_path / "calibrated", *text, "--length", 32, "--no-evaluate").code == 0
    known = ("--quantize", "int4", "--statistics", tmp_path / "statistics")
    assert run("export", tmp_path / "calibrated", tmp_path / "nearer", *known).code == 0
    assert_error(run("export", tmp_path / "small", out, "--quantize", "int8", "--to", "dense"), "is for standalone checkpoints")
    assert not out.exists()


def test_export_to_onnx(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[PreTrainedModel] = []

    def write(model: PreTrainedModel, folder: Path) -> None:  # what the files hold, tests/standalone/test_onnx_export.py checks
        given.append(model)
        for name in ("prefill.onnx", "decode.onnx"):
            (folder / name).write_bytes(name.encode())
        (folder / "config.json").write_text(json.dumps({"reparam_layers": {}}))

    monkeypatch.setattr(export_command, "save_onnx", write)
    assert run("compress", models / "llama", tmp_path / "small", "--rank", 4, "--method", "svd", "--no-evaluate").code == 0
    assert run("export", tmp_path / "small", tmp_path / "out").code == 0
    for _ in range(2):  # over a standalone checkpoint, and over such an export
        result = run("export", tmp_path / "small", tmp_path / "out", "--to", "onnx", "--overwrite", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["bytes"] == len("prefill.onnxdecode.onnx")
        assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"prefill.onnx", "decode.onnx"}
        assert not (tmp_path / "out/model.safetensors").exists()
    assert all(isinstance(model, LlamaForCausalLM) and model.dtype == torch.float32 for model in given)


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
