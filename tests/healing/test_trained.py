"""What healing trains is what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.healing import ROWS, small, stacked, trainer
from support.models import bert, llama, qwen_moe
from torch import nn

from reparam_peft import ReparamConfig, compress
from reparam_peft.healing.trained import set_trained


@pytest.mark.parametrize("trains", [["factors"], ["norms"], ["factors", "norms", "biases"]])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_what_is_trained_is_saved(trains: list[str], form: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return llama(attention_bias=True)

    model = compress(build(), ReparamConfig(target_modules="all-linear", keep=0.5, form=form), [stacked(ROWS)], progress=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(tmp_path, model, teacher=build(), trains=trains)
    made.train()
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(before[n], p)}
    assert any("reparam_factors" in n and n.endswith("weight") for n in changed) == ("factors" in trains)
    assert any(n.endswith("reparam_factors.default.bias") for n in changed) == ("biases" in trains)
    norms = [n for n, m in model.get_base_model().named_modules() if n.endswith("norm") and "original" not in n]
    saved_whole = set(model.peft_config["default"].modules_to_save or ())
    assert (len(saved_whole & set(norms)) == 5) == ("norms" in trains)
    model.eval()
    made.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
    batch = stacked(ROWS[:4])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_heads_that_are_saved_whole_are_trained(tmp_path: Path) -> None:
    model = small(bert, modules_to_save=["classifier"], target_modules=["query", "key", "value", "dense"])
    set_trained(model, [])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == [f"base_model.model.classifier.modules_to_save.default.{key}" for key in ("bias", "weight")]


def test_routers_alone_are_trained_and_saved(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.5)
    model = compress(qwen_moe(), config, [stacked(ROWS)], progress=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(tmp_path, model, teacher=qwen_moe(), trains=["routers"])
    made.train()
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(before[n], p)}
    assert changed == set()
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    assert model.peft_config["default"].modules_to_save == routers
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.{router}.modules_to_save.default.weight" for router in routers}
    model.eval()
    made.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(qwen_moe(), tmp_path / "saved").eval()
    batch = stacked(ROWS[:4])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        untrained = PeftModel.from_pretrained(qwen_moe(), tmp_path / "saved")
        assert not torch.equal(
            untrained.get_submodule(f"base_model.model.{routers[0]}").original_module.weight,
            model.get_submodule(f"base_model.model.{routers[0]}").modules_to_save["default"].weight,
        )


def test_routers_of_a_model_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names 'routers', and the model has no routers"):
        trainer(tmp_path, small(llama), teacher=llama(), trains=["routers"])
