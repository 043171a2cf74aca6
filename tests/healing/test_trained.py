"""What healing trains is what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.healing import ROWS, small, stacked, trainer
from support.models import bert, llama
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
