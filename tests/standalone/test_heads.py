from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from support.models import llama, masked_lm, token_inputs
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertForMaskedLM

from reparam_peft import ReparamConfig
from reparam_peft.layers.tied_head import TiedHead
from reparam_peft.standalone.self_contained import save_self_contained


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.eval()(**token_inputs()).logits
    return made


def standalone(**options: Any) -> Any:
    config = ReparamConfig(target_modules=["lm_head", "q_proj"], keep=0.6, ensure_weight_tying=True)
    return get_peft_model(llama(tie_word_embeddings=True), config).base_model.to_standalone(**options)


def test_a_shared_table_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    plain = standalone()
    expected = logits(plain)
    plain.save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a/model.safetensors", framework="pt") as content:
        names = [name for name in content.keys() if "embed" in name or "head" in name]  # noqa: SIM118
    assert sorted(names) == [f"model.embed_tokens.{key}" for key in ("A.weight", "B.weight", "weight")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), expected)
    assert isinstance(loaded.lm_head, TiedHead)
    assert loaded.lm_head.table is loaded.model.embed_tokens
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), expected)
    assert not any(isinstance(m, TiedHead) for m in AutoModel.from_pretrained(tmp_path / "a").modules())
    assert logits(AutoModelForCausalLM.from_config(loaded.config)).isfinite().all()
    assert loaded.generate(**token_inputs(), max_new_tokens=2, pad_token_id=0).shape == (2, 14)
    for model in (plain, loaded):
        with pytest.raises(ValueError, match="embeddings are factorised, so that they cannot be resized"):
            model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="knows factorised layers only"):
        save_self_contained(plain, tmp_path / "alone")
    with pytest.raises(ValueError, match="no table of embeddings that is not factorised"):
        standalone(quantize_tables="int8")


def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    model = masked_lm()
    torch.nn.init.normal_(model.cls.predictions.bias)
    config = ReparamConfig(target_modules=["word_embeddings"], keep=0.6, ensure_weight_tying=True)
    plain = get_peft_model(model, config).base_model.to_standalone()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(BertForMaskedLM.from_pretrained(tmp_path)), logits(plain))


@pytest.mark.parametrize("tied", [3, {"lm_head": "model.norm"}, {"lm_head": 1}, {"model.norm": "model.embed_tokens"}])
def test_what_config_says_of_heads_is_checked(tied: Any, tmp_path: Path) -> None:
    standalone().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["tied"] = tied
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json .*the checkpoint is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
