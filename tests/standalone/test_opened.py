"""Opened parameters in standalone checkpoints, and who does not know the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from support.models import qwen_moe, token_inputs, xlnet
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from reparam_peft import ReparamConfig
from reparam_peft.standalone.checkpoint import METHOD

CASES: dict[str, tuple[Any, Any, str]] = {
    "experts": (qwen_moe, "all-experts", "model.layers.1.mlp.experts.down_proj"),
    "another parameter": (xlnet, ["rel_attn.q"], "transformer.layer.1.rel_attn.q"),
}


def plain(build: Any, parameters: Any) -> PreTrainedModel:
    config = ReparamConfig(target_modules=[], target_parameters=parameters, keep=0.5)
    return get_peft_model(build(), config).base_model.to_standalone().eval()


@pytest.mark.parametrize("case", CASES)
def test_who_does_not_know_the_format_fails_where_parameters_alone_are_factorised(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, parameters, name = CASES[case]
    small = plain(build, parameters)
    small.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as content:
        assert content.get_slice(name).get_shape() == [1]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = small(**token_inputs()).logits
    assert torch.equal(loaded.eval()(**token_inputs()).logits, expected)
    again = AutoModelForCausalLM.from_config(loaded.config).eval()
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again(**token_inputs()).logits, expected)
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, METHOD)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_pattern_that_was_turned_around_is_noticed_though_the_matrix_is_square(tmp_path: Path) -> None:
    plain(xlnet, ["rel_attn.q"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    assert "(a) -> (b c)" in text
    file.write_text(text.replace("(a) -> (b c)", "(a) <- (b c)"))
    with pytest.raises(ValueError, match=r"rel_attn\.q: config.json says '\(a\) <- \(b c\)', and .* damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
