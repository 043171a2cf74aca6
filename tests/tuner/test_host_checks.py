from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from support.models import bert, gpt2, llama, token_inputs
from support.tolerances import assert_close
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2ForCTC

from reparam_peft import ReparamConfig, compress
from reparam_peft.tuner.layer import ReparamLayer

BATCHES = [{"input_ids": torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(2))}]


def small(**options: object) -> PeftModel:
    return get_peft_model(llama(), ReparamConfig(**{"target_modules": "all-linear", "r": 8, **options})).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_inputs()).logits


# Saving


def injected() -> nn.Module:
    return inject_adapter_in_model(ReparamConfig(target_modules=["q_proj"], r=8), llama())


NOT_WHOLE = {
    "base of a PeftModel": lambda: small().get_base_model(),
    "base within": lambda: small().base_model.model.model,
    "tuner": lambda: small().base_model,
    "injected": injected,
    "merged, not unloaded": lambda: (model := small(), model.merge_adapter())[0].get_base_model(),
    "kept base": lambda: small(keep_base=True).get_base_model(),
    "deep copy": lambda: copy.deepcopy(small()).get_base_model(),
}


@pytest.mark.parametrize("make", NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_a_base_model_with_factors_is_not_saved_as_an_ordinary_one(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"has factors in place of its weight.*to_standalone.*merge_and_unload"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_models_are_saved_as_before(tmp_path: Path) -> None:
    model = small()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    by_transformers = llama()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    by_transformers.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    model.to_standalone().save_pretrained(tmp_path / "standalone")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "standalone")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "dense")
    assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    kept = small(keep_base=True)
    kept.unload().save_pretrained(tmp_path / "unloaded")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "unloaded")), logits(llama()))


# Resizing


def saved_whole() -> PeftModel:
    return get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], r=8, modules_to_save=["lm_head"]))


FIXED = {
    "head": lambda: small(target_modules=["q_proj", "lm_head"], r=16),
    "table": lambda: small(target_modules=["embed_tokens"], r=16),
    "standalone head": lambda: small(target_modules=["q_proj", "lm_head"], r=16).to_standalone(),
    "standalone table": lambda: small(target_modules=["embed_tokens"], r=16).to_standalone(),
    "head that is saved whole": saved_whole,
}


@pytest.mark.parametrize("make", FIXED.values(), ids=FIXED.keys())
def test_embeddings_that_are_not_plain_are_not_resized_half_way(make: Callable[[], nn.Module]) -> None:
    model = make()
    expected, shapes = logits(model.eval()), {key: value.shape for key, value in model.state_dict().items()}
    for call in ({"new_num_tokens": 110}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=r"put embeddings are (factorised|saved whole).*Resize the base model before"):
            model.resize_token_embeddings(**call)
    for call in ({}, {"new_num_tokens": 100}, {"new_num_tokens": 97, "pad_to_multiple_of": 10}):
        assert model.resize_token_embeddings(**call) is model.get_input_embeddings()
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("standalone", [False, True])
def test_plain_embeddings_of_a_compressed_model_are_resized(standalone: bool, tmp_path: Path) -> None:
    model = small().to_standalone() if standalone else small()
    before = logits(model)
    model.resize_token_embeddings(110)
    assert torch.equal(logits(model)[..., :100], before)
    assert logits(model).shape[-1] == 110
    if standalone:
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# A LoRA on top

LORA = {"init_lora_weights": False, "r": 2}
USUAL = {
    "names": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "regular expression": (llama, {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "default of the architecture": (llama, {}),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "head beside": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "Conv1D": (gpt2, {}),
    "DoRA": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "encoder": (bert, {}),
}


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize(("build", "options"), USUAL.values(), ids=USUAL.keys())
def test_a_lora_on_a_standalone_model_by_the_usual_names(
    build: Callable[[], nn.Module], options: dict[str, object], form: str, tmp_path: Path
) -> None:
    def standalone() -> nn.Module:
        return get_peft_model(build(), ReparamConfig(target_modules="all-linear", r=8, form=form)).to_standalone().eval()

    model = get_peft_model(standalone(), LoraConfig(**LORA, **options)).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    expected = logits(model)
    assert not torch.allclose(expected, logits(standalone()), atol=1e-4)
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(standalone(), tmp_path / "lora").eval()
    assert torch.equal(logits(again), expected)
    sizes = {name: tensor.shape for name, tensor in standalone().state_dict().items()}
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == sizes


def test_patterns_of_a_layer_hold_for_its_factors() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], rank_pattern={"q_proj": 5, "lm_head": 3}, alpha_pattern={})
    model = get_peft_model(small(form="pivot").to_standalone(), config)
    ranks = {name.split(".lora_A")[0]: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {5}
    assert {name.rpartition("q_proj.")[2] for name in ranks if "q_proj" in name} == {"B", "A.K"}
    assert [rank for name, rank in ranks.items() if "lm_head" in name] == [3]


def test_a_lora_of_the_dense_model_is_refused_on_its_factors(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    model = small().to_standalone()
    with pytest.raises(ValueError, match="q_proj: the layer is factorised, and the LoRA that is loaded was trained on a dense"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("name", ["default", "lora"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("keep_base", [False, True])
def test_a_lora_around_an_adapter_is_refused_before_anything_is_changed(
    keep_base: bool, targets: object, name: str, tmp_path: Path
) -> None:
    model = small(keep_base=keep_base, target_modules=["q_proj", "v_proj"])
    expected, modules = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"to_standalone\(\)`, and put the LoRA on that"):
        get_peft_model(model.get_base_model(), LoraConfig(r=2, target_modules=targets), adapter_name=name)
    assert [type(module) for module in model.modules()] == modules
    assert [type(config) for config in model.peft_config.values()] == [ReparamConfig]
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_a_calibrated_standalone_model_is_trained_with_a_lora() -> None:
    compressed = compress(llama(), ReparamConfig(target_modules="all-linear", keep=0.6), BATCHES, progress=False)
    model = get_peft_model(compressed.to_standalone(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [module for module in model.modules() if isinstance(module, ReparamLayer)]


def test_models_that_know_no_embeddings_are_saved_with_their_head(tmp_path: Path) -> None:
    """PEFT looks for embeddings where a head is among the targets, and models of audio raise there."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    convolutions = {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}

    def build() -> Wav2Vec2ForCTC:
        torch.manual_seed(0)
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, tie_word_embeddings=True)).eval()
        model._tied_weights_keys = {"decoder": "encoder"}  # as detectors have them, for which PEFT asks for embeddings, too
        return model

    small = get_peft_model(build(), ReparamConfig(target_modules="all-linear", keep=0.5)).eval()
    assert "lm_head" in small.peft_config["default"].rank_pattern
    small.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    sound = torch.randn(1, 2000)
    assert torch.equal(loaded(sound).logits, small(sound).logits)
