"""Standalone checkpoints of architectures whose tensors transformers renames, splits and joins in its own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.standalone import IDS, small
from transformers import (
    AutoModelForCausalLM,
    FunnelConfig,
    FunnelForMaskedLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertForMaskedLM,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from reparam_peft import ReparamConfig
from reparam_peft.standalone.checkpoint import keep_names

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 100}


def nomic() -> PreTrainedModel:
    """Its q, k and v are one matrix in transformers' files."""
    return NomicBertForMaskedLM(NomicBertConfig(**SIZES, vocab_size=100))


def marian() -> PreTrainedModel:
    """Its positions are computed, and in no file."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in {"layers": 1, "ffn_dim": 48}.items()}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0}
    return MarianMTModel(MarianConfig(d_model=32, vocab_size=100, max_position_embeddings=64, **sizes, **heads, **ids))


def llava() -> PreTrainedModel:
    """All of its tensors have other names in transformers' files, and its head is tied."""
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {**TEXT, "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=99))


def mixtral() -> MixtralForCausalLM:
    """Its experts are one tensor in the model, and one for each expert in transformers' files."""
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))


def mamba() -> PreTrainedModel:
    """It reads weights of its layers itself."""
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100))


def funnel() -> PreTrainedModel:
    """It looks at the shapes of weights when it initialises what is missing."""
    sizes = {"block_sizes": [1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "num_decoder_layers": 1}
    return FunnelForMaskedLM(FunnelConfig(vocab_size=100, **sizes))


MODELS = [nomic, marian, llava, mixtral, mamba, funnel]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*reads this weight itself")
def test_what_is_saved_is_loaded(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    plain = small(model=make().eval(), target_modules=r".*(proj|Wqkv|_head\.k|linear_1|fc1)").to_standalone()
    plain.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= plain.state_dict().keys()
    loaded = type(plain).from_pretrained(tmp_path).eval()
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS} if plain.config.is_encoder_decoder else {})}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, plain(**batch).logits)
    assert {"layers", "format_version"} <= loaded.config.quantization_config.to_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_names_of_experts_stay_as_they_are() -> None:
    model = mixtral()
    keys = [
        f"model.layers.0.mlp.experts.{name}.{i}.{part}.weight"
        for name in ("gate_up_proj", "down_proj")
        for i in (0, 3)
        for part in "AB"
    ]
    state = {key: torch.zeros(2, 2) for key in keys}
    keep_names(model)
    assert revert_weight_conversion(model, dict(state)).keys() == state.keys()


def as_before(folder: Path, plain: PreTrainedModel) -> None:
    """A checkpoint of version 1: what is not factorised as in transformers' files."""
    vars(plain).pop("_weight_conversions")
    plain.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config), encoding="utf-8")


def test_checkpoints_of_version_1_are_read(tmp_path: Path) -> None:
    plain = get_peft_model(mixtral(), ReparamConfig(target_modules=["q_proj", "v_proj"], keep=0.6)).eval().to_standalone()
    as_before(tmp_path, plain)
    assert any("experts.3.w2" in key for key in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, plain(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format_version"] == 2
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == plain.state_dict().keys()


def test_version_1_with_a_tensor_missing(tmp_path: Path) -> None:
    plain = get_peft_model(mixtral(), ReparamConfig(target_modules=["q_proj"], keep=0.6)).to_standalone()
    as_before(tmp_path, plain)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_factors_that_were_not_loaded() -> None:
    """A state dict has no file whose header could be looked at."""
    plain = small(model=nomic()).to_standalone()
    state = plain.state_dict()
    name = next(key for key in state if key.endswith("q_proj.B.weight"))
    del state[name]
    plain.config.quantization_config = plain.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match=rf"{name}: the tensor was not loaded from the checkpoint"):
        NomicBertForMaskedLM.from_pretrained(None, config=plain.config, state_dict=state)
