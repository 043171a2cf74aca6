"""Factors that compute in few bits while they train: what is evaluated is stored, and what is saved is not rounded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.healing import ROWS, losses, small, stacked, trainer
from support.models import llama, vit
from support.narrow import narrowed
from torch import Tensor, nn

from reparam_peft import HealingTrainer, ReparamConfig, calibrate, compress
from reparam_peft.arguments import ReparamWarning
from reparam_peft.healing.fake_quantization import NUMBERS, computing_in_few_bits, stored_numbers
from reparam_peft.layers.factorized import FactorizedModule, numbers_of, weight_of
from reparam_peft.layers.schemes import SCHEMES
from reparam_peft.tuner.layer import reparam_layers

RANKS = {"q_proj|o_proj": 24, "k_proj|v_proj": 16, "gate_proj|up_proj|down_proj": 32}  # even, for bitsandbytes on a CPU


def few(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return small(lambda: llama().to(dtype), rank_pattern=RANKS, **options)


def anatomy(model: nn.Module) -> list[Any]:
    """Classes of modules, what stands in the place of methods and parameters of theirs, and the keys of the state dict."""
    modules = [
        (name, type(m), m._forward_hooks.keys(), m._forward_pre_hooks.keys(), vars(m).keys() & {"forward", "weight", NUMBERS})
        for name, m in model.named_modules()
    ]
    return [*modules, *model.state_dict()]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "reparam_factors" in name}


def numbers(model: PeftModel) -> list[Tensor]:
    pieces = [piece for _, layer in reparam_layers(model) for piece in layer.factorized("default").pieces.values()]
    return [weight_of(piece).detach().to(model.dtype) for piece in pieces]


@pytest.mark.parametrize(("quantize", "form", "dtype"), [("int4", "factors", torch.float32), ("int8", "pivot", torch.bfloat16)])
def test_what_is_evaluated_is_stored(quantize: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = few(dtype, form=form)
    made = trainer(tmp_path, model, quantize=quantize, max_steps=1, eval_dataset=ROWS[:4], bf16=dtype != torch.float32)
    classes = [type(module) for module in model.modules()]
    made.train()
    predicted = made.predict(ROWS[:4]).predictions
    assert [type(module) for module in model.modules()] == classes
    stored = model.eval().to_standalone(quantize=quantize)
    modules = [module for module in stored.modules() if isinstance(module, FactorizedModule)]
    held = [numbers_of(piece) for module in modules for piece in module.pieces.values()]
    with computing_in_few_bits(model, quantize):
        computed = numbers(model)
    assert all(torch.equal(one, two) for one, two in zip(computed, held, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(numbers(model), held, strict=True))
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(predicted), stored(**stacked(ROWS[:4])).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: narrowed(llama()), lambda: small(rank_pattern={".*": 8})])
def test_what_is_rounded_is_what_a_checkpoint_rounds(make: Any) -> None:
    """Also what is stored as it is, since neurons were left out; and not the rows of A at rank 8, which are too short."""
    model = make()
    stored = model.to_standalone(quantize="int8")
    plain = {name: m for name, m in stored.named_modules() if isinstance(m, FactorizedModule)}
    rounded = []
    with computing_in_few_bits(model, "int8"):
        for name, layer in reparam_layers(model.get_base_model()):
            for part, piece in layer.factorized("default").pieces.items():
                assert torch.equal(weight_of(piece), numbers_of(plain[name].pieces[part])), (name, part)
                rounded.append(NUMBERS in vars(piece))
    assert any(rounded)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_those_at_the_rounded_numbers(use_reentrant: bool, tmp_path: Path) -> None:
    """Of accumulated batches, also where activations are computed again in the backward pass, or in one of their own."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1, "optim": "sgd"}
    model, at = few(), few()
    for parameter in factors(at):
        value = at.get_parameter(parameter)
        value.data = stored_numbers(value, SCHEMES["int8"], torch.float32)
    changes = []
    for each, quantize in ((model, "int8"), (at, None)):
        start = factors(each)
        made = trainer(tmp_path, each, quantize=quantize, learning_rate=1.0, max_grad_norm=0.0, warmup_steps=0, **options)
        if each is model:
            each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            each.enable_input_require_grads()
        made.train()
        changes.append({name: p - start[name] for name, p in factors(each).items()})
    for name, change in changes[0].items():
        assert change.norm() > 0
        assert (change - changes[1][name]).norm() < 1e-2 * change.norm(), name


def test_a_lora_is_rounded_with_the_factors(tmp_path: Path) -> None:
    model = few()
    made = trainer(tmp_path, model, quantize="int4", lora=LoraConfig(r=4), max_steps=3, learning_rate=1e-2)
    before, start = anatomy(model), factors(model)
    made.train()
    assert anatomy(model) == before
    assert any(not torch.equal(p, start[name]) for name, p in factors(model).items())
    predicted = torch.tensor(made.predict(ROWS[:4]).predictions)
    with torch.no_grad():
        torch.testing.assert_close(predicted, model.eval().to_standalone(quantize="int4")(**stacked(ROWS[:4])).logits)


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    def made(quantize: str = "int8") -> HealingTrainer:
        saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return trainer(tmp_path, few(), quantize=quantize, **saves)

    first = made()
    first.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert not any("InFewBits" in key or NUMBERS in key for key in saved)
    trained = {name.replace(".default", ""): p for name, p in factors(first.model).items()}
    assert all(torch.equal(saved[name], p) for name, p in trained.items()), "what is saved is not rounded"
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, factors(again.model)[name]) for name, p in factors(first.model).items())
    with pytest.raises(ValueError, match="another `quantize`: 'int8', and this one has 'int4'"):
        made("int4").train(resume_from_checkpoint=True)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    model = few(keep_base=True)

    def failing(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        raise KeyboardInterrupt("no loss")

    made = trainer(tmp_path, model, teacher=None, quantize="int8", distillation=0.5, compute_loss_func=failing)
    before, start = anatomy(model), factors(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt, match="no loss"):
        made.train()
    assert anatomy(model) == before
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(p, start[name]) for name, p in factors(model).items())


def test_the_teacher_is_not_rounded(tmp_path: Path) -> None:
    """Be it the model itself, its adapter disabled, or another one, whose answers are kept."""
    found = []
    for options in ({"teacher": None}, {"teacher": llama(), "teacher_cache": tmp_path / "kept"}):
        made = trainer(tmp_path, few(keep_base=True), quantize="int8", max_steps=1, top_k=100, **options)
        made.train()
        found += losses(made)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_what_cannot_be_rounded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`quantize` must be one of .* got 'int2'"):
        trainer(tmp_path, quantize="int2")
    with pytest.raises(ValueError, match="leave out `lora_dropout`"):
        trainer(tmp_path, quantize="int8", lora=LoraConfig(lora_dropout=0.1))
    with pytest.raises(ValueError, match="the model has no factors that are some; leave it out"):
        trainer(tmp_path, small(vit, target_modules=["projection"]), teacher=vit(), quantize="int8")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.TrainingArguments.n_gpu", 2)
        with pytest.raises(ValueError, match="`quantize` needs a process for each device"):
            trainer(tmp_path, quantize="int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        trainer(tmp_path, quantize="int8")


def test_statistics_give_a_better_start_once(tmp_path: Path) -> None:
    batch = stacked(ROWS[:16])
    statistics = calibrate(llama(), ReparamConfig(target_modules="all-linear", keep=0.4), [batch], progress=False)
    model, nearest = few(), few()
    made = trainer(tmp_path, model, quantize="int4", statistics=statistics, max_steps=1, learning_rate=0.0, trains=["factors"])
    made.train()
    start = factors(model)
    with torch.no_grad():
        exact = few()(**batch).logits
        errors = [(each.eval().to_standalone(quantize="int4")(**batch).logits - exact).norm() for each in (model, nearest)]
    assert errors[0] < 0.8 * errors[1]
    made.train()
    assert all(torch.equal(p, start[name]) for name, p in factors(model).items()), "not rounded again"
    assert model.peft_config["default"].healed_for == "int4"
    with pytest.warns(ReparamWarning, match=r"The factors were healed with `quantize='int4'`.* which `statistics` undo"):
        model.to_standalone(quantize="int4", statistics=statistics)


def test_statistics_that_have_no_use_are_refused(tmp_path: Path) -> None:
    some = ReparamConfig(target_modules=["q_proj"], keep=0.4)
    statistics = calibrate(llama(), some, [stacked(ROWS[:4])], progress=False)
    with pytest.raises(ValueError, match="`statistics` have an effect with `quantize` only"):
        trainer(tmp_path, statistics=statistics)
    with pytest.raises(ValueError, match="k_proj: `statistics` do not hold this module"):
        trainer(tmp_path, quantize="int8", statistics=statistics)
    some = ReparamConfig(target_modules=["q_proj"], keep=0.4, ceiling=0.6, form="factors")
    nested = compress(llama(), some, statistics, progress=False)
    with pytest.raises(ValueError, match="the adapter has no smaller sizes"):
        trainer(tmp_path, nested, quantize="int8", statistics=statistics)
