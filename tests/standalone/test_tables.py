"""Tables of embeddings in 8 bits, tied and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import llama
from support.standalone import logits, small
from support.tolerances import relative_error
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from reparam_peft.standalone.self_contained import save_self_contained
from reparam_peft.standalone.tables import check_tables

TABLE = "model.embed_tokens"


def dense(tied: bool) -> PreTrainedModel:
    model = llama(tie_word_embeddings=tied)
    model.tie_weights()
    return model.eval()


def quantised(tied: bool = True, **options: Any) -> Any:
    return small(model=dense(tied), target_modules=["q_proj", "up_proj"]).to_standalone(quantize_tables="int8", **options)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_compute_nearly_the_same_and_are_stored(tied: bool, quantize: str | None, tmp_path: Path) -> None:
    model, plain = quantised(tied, quantize=quantize), small(model=dense(tied), target_modules=["q_proj", "up_proj"])
    got = logits(model)
    assert 0 < relative_error(got, logits(plain)) < 0.05
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    assert tensors[f"{TABLE}.weight"].dtype == torch.int8
    assert tensors[f"{TABLE}.weight_scale"].shape == (100, 1)
    assert ("lm_head.weight" in tensors) == ("lm_head.weight_scale" in tensors) == (not tied)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), got)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_reader_needs_the_documented_arithmetic_only(tmp_path: Path) -> None:
    model = quantised()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["tables"] == {TABLE: "int8"}
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors[f"{TABLE}.weight"].float() * tensors[f"{TABLE}.weight_scale"]
    torch.testing.assert_close(model.model.embed_tokens(torch.arange(100)), table)


def test_the_base_model_from_the_same_checkpoint_and_a_model_from_its_config(tmp_path: Path) -> None:
    model = quantised(tied=False)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state, expected)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(made.lm_head.weight.data) is type(model.lm_head.weight.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{TABLE}.weight_scale"), "'model.embed_tokens.weight_scale' is missing"),
        (lambda t: t[f"{TABLE}.weight_scale"][3].fill_(torch.nan), "model.embed_tokens: .* NaN or infinite"),
        (lambda t: t.update({f"{TABLE}.weight": torch.zeros(100, 64)}), "embed_tokens.weight' has dtype F32, where torch.int8"),
    ],
)
def test_damaged_tables(change: Any, message: str, tmp_path: Path) -> None:
    quantised().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model.norm": "int8"}, "model.norm: .* but it is a LlamaRMSNorm"),
        ({"model.nothing": "int8"}, "model.nothing: .* there is none"),
        ({TABLE: {}}, "`tables` in config.json must name tables"),
        ([TABLE], "`tables` in config.json must name tables"),
    ],
)
def test_damaged_configs(tables: Any, message: str, tmp_path: Path) -> None:
    quantised().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["tables"] = tables
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_is_refused(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(ValueError, match="`quantize_tables` must be 'int8' or None, got 'int4'"):
        model.to_standalone(quantize_tables="int4")
    with pytest.raises(ValueError, match="does not read tables in few bits"):
        save_self_contained(quantised(), tmp_path)
    model = small(target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="has no table of embeddings that is not factorised"):
        model.to_standalone(quantize_tables="int8")
    assert isinstance(model.base_model.model.model.embed_tokens, nn.Module)


def test_an_older_torchao_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchao.__version__", "0.17.0+cpu")
    with pytest.raises(ImportError, match=r"quantised tables need torchao 0\.18, and 0\.17\.0\+cpu is installed"):
        check_tables("int8")
    check_tables(None)
