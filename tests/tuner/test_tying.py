"""Input and output embeddings that share a table, and one product of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.batches import text
from support.models import gpt2, llama, t5, tied, token_inputs
from support.tolerances import assert_close
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.layers.tied_head import TiedHead

BATCHES = [text([24, 20, 24, 17], 24, seed=seed) for seed in range(4)]
TABLE = "model.embed_tokens"


def shared() -> Any:
    model: Any = tied()
    nn.init.normal_(model.lm_head.weight, std=0.1)
    return model


def both(target_modules: Any = ("lm_head",), **options: Any) -> ReparamConfig:
    targets = target_modules if isinstance(target_modules, str) else [*target_modules]
    return ReparamConfig(target_modules=targets, ensure_weight_tying=True, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.eval()(**token_inputs()).logits
    return made


@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], r".*(lm_head|q_proj)"])
def test_naming_either_end_takes_the_table_once(named: Any) -> None:
    model = shared()
    count, expected = sum(p.numel() for p in model.parameters()), logits(model)
    small = get_peft_model(model, both(named, r="full"))
    ranks = small.peft_config["default"].rank_pattern
    assert [name for name in ranks if "proj" not in name] == [TABLE]
    assert_close(logits(small), expected)
    sizes = small.size_report().to_dict()["model"]
    assert sizes["dense_parameters"] == count
    assert sizes["stored_parameters"] == sum(p.numel() for p in small.parameters())


def test_one_product_is_saved_loaded_trained_and_merged(tmp_path: Path) -> None:
    small = get_peft_model(shared(), both(["lm_head", "q_proj"], keep=0.6))
    expected = logits(small)
    small.save_pretrained(tmp_path / "adapter")
    names = [name for name in load_file(tmp_path / "adapter/adapter_model.safetensors") if "q_proj" not in name]
    assert sorted(names) == [f"base_model.model.{TABLE}.reparam_factors.{key}.weight" for key in "AB"]
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(shared(), tmp_path / "adapter", **options)), expected)
    host = shared()
    host.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(host), expected)
    small.train()(**token_inputs(), labels=token_inputs()["input_ids"]).loss.backward()
    gradient = small.get_base_model().get_submodule(TABLE).factorized("default").B.weight.grad
    assert (gradient.norm(dim=1) > 0).all()  # also of tokens that were not read
    small.merge_adapter()
    assert_close(logits(small), expected)
    small.unmerge_adapter()
    assert torch.equal(logits(small), expected)
    with pytest.raises(ValueError, match="embeddings are factorised, so that they cannot be resized"):
        small.resize_token_embeddings(120)
    dense = small.merge_and_unload()
    assert type(dense.lm_head) is nn.Linear
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.save_pretrained(tmp_path / "dense")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_gradients_of_both_uses_add_up() -> None:
    small = get_peft_model(shared(), both(r=16)).train()
    table = small.get_base_model().get_submodule(TABLE)
    merged = get_peft_model(shared(), both(r=16)).merge_and_unload()
    for one in (small, merged):
        one.requires_grad_(True)
        one(**token_inputs(), labels=token_inputs()["input_ids"]).loss.backward()
    factors = table.factorized("default")
    dense = merged.lm_head.weight.grad  # (tokens, features) of B^T A^T
    assert_close(factors.B.weight.grad, dense @ factors.A.weight)
    assert_close(factors.A.weight.grad, dense.mT @ factors.B.weight)


def test_a_base_that_is_kept_serves_both_ends_again() -> None:
    expected = logits(shared())
    small = get_peft_model(shared(), both(keep=0.6, keep_base=True))
    first = logits(small)
    small.add_adapter("other", both(keep=0.4, keep_base=True))
    small.set_adapter("other")
    second = logits(small)
    assert not torch.equal(first, second)
    with small.disable_adapter():
        assert_close(logits(small), expected)
    small.delete_adapter("other")
    small.set_adapter("default")
    assert torch.equal(logits(small), first)
    plain = small.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(logits(plain), expected)


def test_calibration_sees_both_uses() -> None:
    dense = logits(shared())

    def divergence(model: Any) -> float:
        made = logits(model).log_softmax(-1)
        return float((dense.softmax(-1) * (dense.log_softmax(-1) - made)).sum(-1).mean())

    free = divergence(get_peft_model(shared(), both(keep=0.7)))
    config = both(keep=0.7, allocation="uniform")
    statistics = calibrate(shared(), config, BATCHES, progress=False)
    assert statistics.inputs[TABLE].gram.min() > 0  # tokens that are never read are predicted
    small = compress(shared(), config, statistics, progress=False)
    assert divergence(small) < 0.7 * free
    without = compress(shared(), both(keep=0.7, output_metric="none", allocation="uniform"), BATCHES, progress=False)
    assert divergence(without) < free


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (
            tied,
            {"target_modules": ["lm_head"]},
            r"One product for an embedding and its heads is made with `ensure_weight_tying",
        ),
        (tied, {"target_modules": ["embed_tokens"], "exclude_modules": ["lm_head"], "ensure_weight_tying": True}, "shared"),
        (t5, {"target_modules": ["shared"], "ensure_weight_tying": True}, "the weight is shared"),
        (tied, {"target_modules": ["lm_head"], "ensure_weight_tying": 1}, "`ensure_weight_tying` must be"),
    ],
)
def test_what_is_not_asked_for_or_cannot_be_shared_is_refused(build: Any, options: dict[str, Any], match: str) -> None:
    model = build()
    with pytest.raises((TypeError, ValueError), match=match):
        get_peft_model(model, ReparamConfig(keep=0.5, **options))
    assert not any(isinstance(module, TiedHead) for module in model.modules())


def test_errors_and_loading_leave_the_table_tied(tmp_path: Path) -> None:
    model = shared()
    head = model.lm_head
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        get_peft_model(model, both(["lm_head", "up_proj"], keep=0.6))
    assert model.lm_head is head
    assert head.weight is model.model.embed_tokens.weight
    shared().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be compressed while loading"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=both())


def test_models_without_a_shared_table_are_told() -> None:
    for model, targets in ((llama(), ["lm_head"]), (tied(), ["q_proj"])):
        with pytest.warns(UserWarning, match="names no embedding that shares its table"):
            get_peft_model(model, both(targets, keep=0.6))
    small = get_peft_model(gpt2(), both(["wte"], r="full"))
    assert_close(logits(small), logits(gpt2()))
