"""ONNX files of standalone models: what ONNX Runtime computes from them, beside PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import onnxruntime
import pytest
import torch
from peft import get_peft_model
from support.models import bert, llama, t5, vit
from support.narrow import narrowed
from support.standalone import NARROW
from support.versions import unless
from transformers import PreTrainedModel

from reparam_peft import ReparamConfig
from reparam_peft.standalone import onnx_export as onnx_export
from reparam_peft.standalone.onnx_export import save_onnx

pytest.importorskip("transformers.exporters.runners", reason="ONNX files need transformers 5.23")
WRITES = unless("torch", "2.10", "is older than what transformers' exporters ask for")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def standalone(make: Callable[[], PreTrainedModel], form: str = "pivot", quantize: str | None = None) -> PreTrainedModel:
    if form == NARROW:
        return narrowed(make()).to_standalone(quantize).eval()
    targets = ["projection", "query", "up_proj"] if make is vit else "all-linear"
    return get_peft_model(make(), ReparamConfig(target_modules=targets, keep=0.6, form=form)).to_standalone(quantize).eval()


@WRITES
def test_a_classifier(tmp_path: Path) -> None:
    model = standalone(bert, NARROW)  # which has layers of all forms
    save_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows, length in ((1, 5), (4, 16)):
        tokens = torch.arange(rows * length).view(rows, length) % 50
        mask = torch.ones_like(tokens)
        mask[0, -2:] = 0
        (got,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(torch.from_numpy(got), expected, **TOLERANCE)


@WRITES
def test_an_image_classifier(tmp_path: Path) -> None:
    model = standalone(vit)
    save_onnx(model, tmp_path)
    images = torch.rand(5, 3, 16, 16)
    (got,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(images).logits, **TOLERANCE)


@WRITES
def test_a_decoder_continues_from_its_past(tmp_path: Path) -> None:
    """Greedy decoding of a padded batch by the two graphs, against `generate`; transformers reads them too."""
    model = standalone(lambda: llama(num_hidden_layers=1))
    save_onnx(model, tmp_path)
    assert_read_back(model, tmp_path)
    tokens = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask = (tokens > 0).long()
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    prefill, decode = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("prefill", "decode"))
    state = {
        "input_ids": tokens.numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0).numpy(),
    }
    session, made = prefill, []
    for _ in range(6):
        wanted = [value.name for value in session.get_inputs()]
        names = [value.name for value in session.get_outputs()]
        results = dict(zip(names, session.run(names, {key: state[key] for key in wanted}), strict=True))
        logits = results["logits"][:, -1]
        logits[:, model.generation_config.eos_token_id] = -numpy.inf
        state["input_ids"] = logits.argmax(-1)[:, None]
        made.append(state["input_ids"])
        state["attention_mask"] = numpy.pad(state["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
        state["position_ids"] = state["position_ids"][:, -1:] + 1
        past = {key: value for key, value in results.items() if key != "logits"}  # whose names differ between versions
        state |= {"input." + key.removeprefix("output."): value for key, value in past.items()}
        session = decode
    assert numpy.concatenate(made, 1).tolist() == expected[:, 5:].tolist()


@WRITES
def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    model = standalone(lambda: t5(layers=1))
    save_onnx(model, tmp_path)
    assert_read_back(model, tmp_path)


def assert_read_back(model: PreTrainedModel, folder: Path) -> None:
    """Transformers finds both graphs, and the layers that are in them."""
    from transformers.exporters.base import ExportedModel

    assert [*ExportedModel.from_pretrained(folder).components] == ["prefill", "decode"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["reparam_layers"] == model.config.quantization_config.layers
    assert "quantization_config" not in config


@WRITES
def test_what_computes_something_else_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_DIFFERENCE", 1e-12)
    with pytest.raises(ValueError, match=r"model\.onnx computes something else"):
        save_onnx(standalone(vit), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ONNX form"):
        save_onnx(standalone(llama, quantize="int8"), tmp_path / "out")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    remedy = r"pip install --upgrade 'transformers>=5\.23' 'torch>=2\.11' 'reparam_peft\[onnx\]'"
    with pytest.raises(ImportError, match=remedy):
        save_onnx(standalone(bert), tmp_path)
    blind = standalone(bert)
    blind.main_input_name = "input_values"
    with pytest.raises(TypeError, match="input_values"):  # that no library could mend
        save_onnx(blind, tmp_path)


def test_an_older_pytorch_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.exporters.exporter_dynamo.DynamoExporter.min_versions", {"torch": "99"})
    with pytest.raises(ImportError, match=r"PyTorch 2\.11 .*upgrade torch>=99.*pip install --upgrade"):
        save_onnx(standalone(bert), tmp_path)
