"""A LoRA on the factors: trained, merged, resumed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from support.healing import ROWS, arguments, falls, small, stacked, trainer
from support.models import llama, vit
from support.narrow import narrowed
from torch import nn

from reparam_peft import HealingTrainer, ReparamConfig, compress
from reparam_peft.healing.inner_lora import adapted


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_a_lora_is_merged_into_the_factors(form: str, tmp_path: Path) -> None:
    model = small(form=form)
    ranks = dict(model.peft_config["default"].rank_pattern)
    made = trainer(tmp_path, model, lora=LoraConfig(r=4, lora_alpha=8), trains=["factors"], max_steps=45)
    made.train()
    assert falls(made)
    assert not any("lora" in name for name, _ in model.named_modules())
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    assert loaded.peft_config["default"].rank_pattern == ranks
    batch = stacked(ROWS[:4])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    original = small(form=form)
    for (name, one), (_, two) in zip(model.named_modules(), original.named_modules(), strict=True):
        if isinstance(one, nn.Linear) and "reparam_factors" in name:
            change = (one.weight - two.weight).detach()
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name


@pytest.mark.parametrize("where", ["same trainer", "loaded checkpoint", "fresh"])
def test_a_lora_resumes_from_whatever_the_factors_are_now(where: str, tmp_path: Path) -> None:
    def made(model: PeftModel) -> HealingTrainer:
        return trainer(tmp_path, model, save_strategy="steps", save_steps=3, seed=3, max_steps=6, lora=LoraConfig(r=4))

    first = made(small())
    first.train()
    whole = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    if where == "same trainer":
        again = first
    elif where == "fresh":
        again = made(small())
    else:
        again = made(PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3", is_trainable=True))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, p in again.model.named_parameters():
        assert (p - whole[name]).norm() <= 1e-6 * whole[name].norm(), name


def test_a_trainer_with_a_lora_trains_twice(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=LoraConfig(r=4), max_steps=3)
    made.train()
    between = {name: p.detach().clone() for name, p in made.model.named_parameters() if "reparam_factors" in name}
    made.train()
    assert any(not torch.equal(p, between[name]) for name, p in made.model.named_parameters() if name in between)


def test_lora_beside_biases(tmp_path: Path) -> None:
    model = compress(
        llama(attention_bias=True), ReparamConfig(target_modules="all-linear", keep=0.5), [stacked(ROWS)], progress=False
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(tmp_path, model, teacher=llama(attention_bias=True), lora=LoraConfig(r=2), max_steps=3).train()
    assert any(
        n.endswith("reparam_factors.default.bias") and not torch.equal(p, before[n])
        for n, p in model.named_parameters()
        if n in before
    )


def test_a_lora_needs_linear_factors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lora` needs factors that are linear layers"):
        trainer(tmp_path, small(vit, target_modules=["projection"]), teacher=vit(), lora=LoraConfig(r=4))


def test_an_optimizer_cannot_hold_a_lora(tmp_path: Path) -> None:
    model = small()
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(ValueError, match="`optimizers` cannot hold what `lora` adds when training begins"):
        HealingTrainer(
            model, arguments(tmp_path), train_dataset=ROWS, teacher=llama(), lora=LoraConfig(), optimizers=optimizers
        )


@pytest.mark.parametrize("when", ["put in", "merged"])
def test_an_interrupt_leaves_the_whole_lora_or_none(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(model: nn.Module) -> dict[str, Any]:
        modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
        return modules | {name: (p.data_ptr(), p.requires_grad, p.tolist()) for name, p in model.named_parameters()}

    def interrupting(method: Any) -> Any:
        calls = iter(range(3))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        return interrupted

    model = small()
    before = state(model)
    name = "__init__" if when == "put in" else "get_delta_weight"
    with ExitStack() as stack:
        if when == "merged":
            stack.enter_context(adapted(model, LoraConfig(r=2)))
            before = state(model)
        monkeypatch.setattr(LoraLinear, name, interrupting(getattr(LoraLinear, name)))
        enter_or_leave = stack.close if when == "merged" else adapted(model, LoraConfig(r=2)).__enter__
        with pytest.raises(KeyboardInterrupt):
            enter_or_leave()
    assert state(model) == before


def test_every_matrix_of_what_has_lost_neurons_gets_a_lora() -> None:
    model = narrowed(llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "reparam_factors" in name}
    with adapted(model, LoraConfig(r=2, init_lora_weights=False)):
        adapters = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
        assert len(adapters) == len(before) == 2 * 5, "B and K of gate and down, up as it is"
        expected = model(**stacked(ROWS[:2])).logits
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    torch.testing.assert_close(model(**stacked(ROWS[:2])).logits, expected)
