"""What `HealingTrainer` refuses, and that it leaves the model alone then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from support.healing import BERT, ROWS, arguments, small, trainer
from support.models import classifier, llama

from reparam_peft import HealingTrainer, ReparamConfig
from reparam_peft.arguments import ReparamWarning


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher": None}, ValueError, "there is no teacher: the original weights were dropped. Give the dense model as"),
        ({"teacher": "gpt2"}, TypeError, "`teacher` must be another model, got a str"),
        (
            {"teacher": llama(vocab_size=90)},
            ValueError,
            "`teacher` must have the vocabulary of the model, of 100, and has one of 90",
        ),
        ({"distillation": 1.1}, ValueError, r"`distillation` must be in \[0, 1\], got 1\.1"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive and finite"),
        ({"hidden": -1.0}, ValueError, "`hidden` must be finite and not negative"),
        ({"top_k": 0}, ValueError, "`top_k` must be a positive whole number"),
        ({"trains": ["weights"]}, ValueError, "`trains` must be a list of factors, norms, biases, routers, got 'weights'"),
        ({"trains": "factors"}, ValueError, "`trains` must be a list of"),
        ({"teacher_cache": "x", "hidden": 1.0}, ValueError, "`teacher_cache` keeps probabilities at temperature 1 only"),
        ({"lora": {"r": 4}}, TypeError, "`lora` must be a LoraConfig, got a dict"),
        ({"lora": LoraConfig(target_modules=["A"])}, ValueError, "`lora` must name no modules"),
        *(
            ({"lora": LoraConfig(**options)}, ValueError, f"`lora` must be a plain LoRA, in which `{next(iter(options))}` has")
            for options in (
                {"use_dora": True},
                {"rank_pattern": {"A": 2}},
                {"alpha_pattern": {"A": 2}},
                {"layers_to_transform": [0]},
                {"init_lora_weights": "pissa"},
                {"exclude_modules": ["B"]},
                {"lora_bias": True},
            )
        ),
        ({"trains": []}, ValueError, r"`trains` must name something that the model has, got \[\]; add 'factors'"),
        ({"trains": ["biases"]}, ValueError, "`trains` must name something that the model has"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    model = small()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        trainer(tmp_path, model, **options)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [llama, lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))])
def test_other_models_are_refused(build: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`model` must be a PeftModel with an active reparam adapter"):
        trainer(tmp_path, build())


def test_a_refused_trainer_leaves_the_model_alone(tmp_path: Path) -> None:
    model = small()
    names = [name for name, _ in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises((TypeError, ValueError)):
        HealingTrainer(model, arguments(tmp_path), train_dataset=ROWS, teacher=llama(), no_such_option=1)
    assert names == [name for name, _ in model.named_modules()]
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_only_distributions_are_distilled(kind: str, tmp_path: Path) -> None:
    model = small(classifier, **BERT)
    model.get_base_model().config.problem_type = kind
    with pytest.raises(ValueError, match=f"`problem_type` of the model is '{kind}'; use `distillation=0`"):
        trainer(tmp_path, model, teacher=classifier())


def test_outputs_without_logits_need_hidden(tmp_path: Path) -> None:
    made = trainer(tmp_path, small(lambda: classifier().bert, **BERT), teacher=classifier().bert)
    with pytest.raises(ValueError, match="have no `logits` to distil; give `hidden` > 0"):
        made.train()


def test_numbers_in_few_bits_do_not_train(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    patterns = {"rank_pattern": 64, "form_pattern": "dense", "bit_pattern": 8}
    fields: dict[str, Any] = {field: dict.fromkeys(names, value) for field, value in patterns.items()}

    def model() -> Any:
        return get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], **fields)).eval()

    with pytest.raises(ValueError, match=r"names nothing that can be trained: all factors are stored in few bits.*'corrected'"):
        trainer(tmp_path, model(), trains=["factors"])
    with pytest.raises(ValueError, match=r"`lora` is merged into factors .*, and all factors are stored in few bits"):
        trainer(tmp_path, model(), lora=LoraConfig(r=2))
    with pytest.warns(ReparamWarning, match="Only norms are trained: all factors are stored in few bits"):
        trainer(tmp_path, model())
