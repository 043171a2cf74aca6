from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import bert, gpt2, llama, token_inputs

from reparam_peft import ReparamConfig, compress

BATCHES = [{"input_ids": torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(2))}]


def calibrated(build: object = llama, **options: object) -> PeftModel:
    return compress(build(), ReparamConfig(target_modules="all-linear", keep=0.6, **options), BATCHES, progress=False)


def train_a_little(model: PeftModel) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for number, parameter in enumerate(trained):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


def outputs(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        return model.eval()(**token_inputs()).logits


@pytest.mark.parametrize("given", ["the object", "a deep copy", "an equal one"])
@pytest.mark.parametrize("made", ["compress", "moved biases", "svd", "half precision", "loaded"])
def test_an_adapter_of_the_config_of_another_is_its_copy(made: str, given: str, tmp_path: Path) -> None:
    if made == "svd":
        model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r=8, keep_base=True))
    else:
        model = calibrated(gpt2 if made == "moved biases" else llama)
    if made == "half precision":
        model = compress(llama().bfloat16(), ReparamConfig(target_modules="all-linear", keep=0.6), BATCHES, progress=False)
    train_a_little(model)
    if made == "loaded":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    config = model.peft_config["default"]
    if given == "a deep copy" and made != "loaded":  # then its weights are to follow
        config = copy.deepcopy(config)
    elif given == "an equal one" and made != "loaded":
        config = ReparamConfig(**{**config.to_dict(), "peft_type": None})
    model.add_adapter("ref", config)
    expected = outputs(model, "default")
    assert torch.equal(outputs(model, "ref"), expected)
    model.set_adapter("default")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert not [name for name in names if ".ref." in name]
    train_a_little(model)
    assert not torch.equal(outputs(model, "default"), expected)
    assert torch.equal(outputs(model, "ref"), expected)
    assert model.peft_config["ref"] is not model.peft_config["default"]


def test_modules_that_are_saved_whole_are_copied_too() -> None:
    model = get_peft_model(bert(), ReparamConfig(target_modules=["query"], r=4, task_type="SEQ_CLS"))
    train_a_little(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(outputs(model, "ref"), outputs(model, "default"))
    heads = model.classifier.modules_to_save
    assert torch.equal(heads["ref"].weight, heads["default"].weight)
    assert heads["ref"].weight.data_ptr() != heads["default"].weight.data_ptr()


def test_dense_targets_that_were_changed_are_copied_too() -> None:
    model = compress(
        llama(), ReparamConfig(target_modules="all-linear", keep=0.9), BATCHES, refine=True, sequential=True, progress=False
    )
    assert model.peft_config["default"].modules_to_save
    model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(outputs(model, "ref"), outputs(model, "default"))


def test_the_same_checkpoint_under_two_names_is_loaded_twice(tmp_path: Path) -> None:
    saved = calibrated()
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    train_a_little(model)
    model.load_adapter(tmp_path, "as saved")
    assert torch.equal(outputs(model, "as saved"), outputs(saved, "default"))


def test_a_config_whose_weights_never_come_is_refused_when_it_runs(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.add_adapter("ref", ReparamConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="the factors of adapter 'ref' were never loaded"):
        model(**token_inputs())
    model.delete_adapter("ref")
    assert model(**token_inputs()).logits.isfinite().all()


def test_an_adapter_of_another_rank_is_no_copy() -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], r=8))
    config = copy.deepcopy(model.peft_config["default"])
    config.rank_pattern = dict.fromkeys(config.rank_pattern, 4)
    with pytest.warns(UserWarning, match="The new adapter factorises the product of adapter 'default'"):
        model.add_adapter("smaller", config)
    assert not torch.equal(outputs(model, "smaller"), outputs(model, "default"))
