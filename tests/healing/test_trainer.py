"""`HealingTrainer`: accumulation, its teachers, what it saves and resumes, and that it heals."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel
from support.batches import pairs, text
from support.healing import BERT, LENGTH, ROWS, arguments, falls, losses, padded, small, stacked, trainer
from support.models import bert, classifier, llama, masked_lm, t5
from support.processes import run_in_processes
from support.versions import unless
from torch import Tensor, nn
from transformers import Trainer

from reparam_peft import HealingTrainer, perplexity


def moved(model: PeftModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def accumulated(tmp_path: Path, build: Any, teacher: Any, rows: list[dict[str, Tensor]], **options: Any) -> None:
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = small(build, **(BERT if "Bert" in type(build()).__name__ else {"target_modules": ["q", "k", "v", "o"]}))
        step = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1, "optim": "sgd"}
        made = trainer(
            tmp_path,
            model,
            rows,
            teacher=teacher(),
            **step,
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            **options,
        )
        start = moved(model).clone()
        made.train()
        results.append(moved(model) - start)
    assert results[0].norm() > 0
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-3 * results[0].norm(), float((other - results[0]).norm() / results[0].norm())


# The loss


def test_healing_lowers_the_perplexity_of_what_the_teacher_knows(tmp_path: Path) -> None:
    """A teacher that has learned something, a student that has lost it."""
    dense = llama()
    Trainer(
        dense, arguments(tmp_path, max_steps=60), train_dataset=[{**row, "labels": row["input_ids"]} for row in ROWS]
    ).train()
    batches = [stacked(ROWS[i : i + 8]) for i in (0, 8, 16)]

    def base() -> nn.Module:
        other = llama()
        other.load_state_dict(dense.state_dict())
        return other

    model = small(base)
    before = perplexity(model, batches)
    trainer(tmp_path, model, teacher=dense, max_steps=60).train()
    assert perplexity(dense, batches) < perplexity(model, batches) < 0.8 * before


@pytest.mark.parametrize("options", [{}, {"distillation": 0.5}, {"hidden": 1.0}])
def test_accumulated_batches_give_the_gradient_of_the_whole(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows of very different lengths: a mean of means would differ."""
    rows = [{k: v[0] for k, v in text([n], LENGTH, seed=n).items()} for n in (16, 16, 3, 4)]
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = small()
        step = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1, "optim": "sgd"}
        made = trainer(
            tmp_path, model, rows, **step, learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", **options
        )
        made.train()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    before = torch.cat([p.detach().flatten() for p in trainer(tmp_path).model.parameters() if p.requires_grad])
    moved = (results[0] - before).norm()
    assert moved > 0
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-4 * moved


def test_evaluation_needs_no_labels_and_keeps_metrics(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"accuracy": 1.0}

    made = trainer(tmp_path, eval_dataset=ROWS[:8], hidden=0.5)
    made.compute_metrics = metrics
    found = made.evaluate()
    assert found["eval_accuracy"] == 1.0
    assert shapes == [(8, LENGTH, 100)]
    assert found["eval_loss"] > 0


@pytest.mark.parametrize("distillation", [1.0, 0.5])
def test_accumulation_of_a_masked_language_model(distillation: float, tmp_path: Path) -> None:
    rows = padded((16, 15, 3, 4))
    if distillation < 1:
        rows = [{**row, "labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)} for row in rows]
    accumulated(tmp_path, masked_lm, masked_lm, rows, distillation=distillation)


@pytest.mark.parametrize(("distillation", "labelled"), [(1.0, False), (1.0, True), (0.5, True), (0.0, True)])
def test_accumulation_of_a_classifier(distillation: float, labelled: bool, tmp_path: Path) -> None:
    rows = padded((16, 15, 3, 4))
    if labelled:
        rows = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
    accumulated(tmp_path, classifier, classifier, rows, distillation=distillation)


@pytest.mark.parametrize("distillation", [1.0, 0.5])
def test_accumulation_of_an_encoder_decoder(distillation: float, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        model = t5()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return model

    rows = [
        {**row, "labels": torch.where(torch.arange(8) < n, row["input_ids"][:8], -100)}
        for row, n in zip(padded((16, 15, 9, 8)), (8, 2, 1, 5), strict=True)
    ]
    accumulated(tmp_path, plain, plain, rows, distillation=distillation)


def test_accumulation_with_hidden_states_and_several_labels_for_a_row(tmp_path: Path) -> None:
    def several() -> nn.Module:
        model = classifier()
        model.config.problem_type = "multi_label_classification"
        return model

    rows = [{**row, "labels": torch.eye(3)[i % 3]} for i, row in enumerate(padded((16, 15, 3, 4)))]
    accumulated(tmp_path, several, several, rows, distillation=0.0, hidden=0.5)


def test_the_loss_that_is_logged_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    rows = padded((16, 15, 3, 4))
    logged = []
    for size, steps in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path, small(), rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1
        )
        made.train()
        logged.append(losses(made)[0])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


@pytest.mark.parametrize("build", [classifier, masked_lm])
def test_evaluation_without_labels_has_the_loss(build: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, small(build, **BERT), teacher=build(), eval_dataset=ROWS[:4])
    assert made.evaluate()["eval_loss"] > 0


# Teachers


def test_the_model_itself_is_the_teacher_with_keep_base(tmp_path: Path) -> None:
    model = small(keep_base=True)
    made = trainer(tmp_path, model, teacher=None, trains=["norms"], max_steps=45, learning_rate=1e-2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    batch = text([16, 9], 16, seed=7)
    model.train()
    expected = trainer(tmp_path, small(), trains=["norms"])
    expected.model.train()
    assert float(made.compute_loss(model, batch)) == pytest.approx(
        float(expected.compute_loss(expected.model, batch)), rel=1e-5
    )
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.training
    made.train()
    assert falls(made)


def test_the_teacher_is_frozen_and_evaluates(tmp_path: Path) -> None:
    teacher = llama(attention_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer(tmp_path, teacher=teacher, max_steps=2).train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


# What is trained, saved and loaded


@pytest.mark.parametrize("options", [{}, {"lora": LoraConfig(r=4)}, {"bf16": True}, {"distillation": 0.5}])
def test_a_run_that_is_resumed_ends_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: Path, resume: bool, **more: Any) -> PeftModel:
        model = small()
        made = trainer(folder, model, save_strategy="steps", save_steps=3, seed=3, **options, **more)
        made.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return model

    whole = run(tmp_path / "whole", resume=False)
    resumed = run(tmp_path / "whole", resume=True)
    for (name, one), (_, two) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    middle = PeftModel.from_pretrained(llama(), tmp_path / "whole" / "checkpoint-6")
    assert not any("lora" in name for name, _ in middle.named_modules())


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    with pytest.raises(ValueError, match="checkpoint-3 is of a training with another `adapter`"):
        trainer(tmp_path, small(keep=0.3)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="with another `disable_dropout`: True, and this one has False"):
        trainer(tmp_path, disable_dropout=False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("options", [{}, {"lora": LoraConfig(r=4)}])
def test_keep_base_with_checkpointing_of_activations_and_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        small(keep_base=True),
        teacher=None,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        eval_dataset=ROWS[:4],
        max_steps=9,
        **options,
    )
    made.train()
    found = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert found[-1] < found[0]
    assert made.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-4)


# Other models


def test_a_classifier_is_healed(tmp_path: Path) -> None:
    """Dense learns to tell which of three tokens a row begins with, compression forgets it, healing brings it back."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 100, (240, 12), generator=generator)
    labels = torch.arange(240) % 3
    tokens[:, 1] = labels + 3
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y} for t, y in zip(tokens, labels, strict=True)]
    train, test = rows[:180], stacked(rows[180:])
    dense = bert()
    Trainer(dense, arguments(tmp_path, max_steps=150, per_device_train_batch_size=16), train_dataset=train).train()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float(
                (model.eval()(**{k: v for k, v in test.items() if k != "labels"}).logits.argmax(-1) == test["labels"])
                .float()
                .mean()
            )

    base = bert()
    base.load_state_dict(dense.state_dict())
    model = small(
        lambda: base,
        r=1,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["classifier"],
    )
    before = accuracy(model)
    trainer(tmp_path, model, train, teacher=dense, distillation=0.7, max_steps=150, per_device_train_batch_size=16).train()
    assert accuracy(dense) > 0.9
    assert before < accuracy(model) - 0.1
    assert accuracy(model) > 0.8


def test_a_model_of_embeddings_is_healed(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        small(lambda: classifier().bert, **BERT),
        teacher=classifier().bert,
        hidden=1.0,
        max_steps=45,
        eval_dataset=ROWS,
    )
    before = made.evaluate()["eval_loss"]
    made.train()
    assert falls(made)
    assert made.evaluate()["eval_loss"] < 0.9 * before


def test_an_encoder_decoder_is_healed(tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in pairs([8], [6], (8, 6), seed=s).items() if "decoder" not in k} for s in range(16)]
    rows = [{**row, "labels": (row["input_ids"][:6] * 3) % 97 + 2} for row in rows]
    model = small(t5, target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"])
    made = trainer(tmp_path, model, rows, teacher=t5(), max_steps=45)
    made.train()
    assert falls(made)


def test_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    model = small(lambda: llama().bfloat16())
    made = trainer(tmp_path, model, teacher=llama().bfloat16(), bf16=True, max_steps=45)
    made.train()
    assert {p.dtype for n, p in model.named_parameters() if "reparam_factors" in n} == {torch.float32}
    assert falls(made)


# Several processes


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def heal_in_process(rank: int, folder: str, options: dict[str, Any], port: int) -> None:
    """What a launcher starts in each of two processes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    last = options.pop("resume", None)
    shards = "fsdp" in options
    given = arguments(Path(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, **options)
    assert given.device.type == "cpu"
    if shards:  # accelerate shards on accelerators only, unless it takes this for one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = HealingTrainer(small(), given, train_dataset=ROWS, teacher=llama())
    assert made.is_fsdp_enabled == shards
    made.train(resume_from_checkpoint=last)
    kinds = {type(parameter).__name__ for parameter in made.model_wrapped.parameters()}
    assert ("DTensor" in kinds) == shards, kinds
    made.save_model(f"{folder}/saved")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads do not always end in order


def launched(folder: Path, options: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_in_processes(heal_in_process, str(folder), options, port)


def saved_state(folder: Path) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in PeftModel.from_pretrained(llama(), folder / "saved").named_parameters()}


SHARDS = pytest.param(FSDP, id="shards", marks=unless("torch", "2.8", "sums gradients of shards on CPUs up"))


@pytest.mark.parametrize("options", [pytest.param({}, id="copies"), SHARDS])
def test_two_processes_train_as_one(options: dict[str, Any], tmp_path: Path) -> None:
    launched(tmp_path / "two", options)
    alone = trainer(tmp_path / "one", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2)
    alone.train()
    alone.save_model(tmp_path / "one" / "saved")
    two, one, start = saved_state(tmp_path / "two"), saved_state(tmp_path / "one"), dict(small().named_parameters())
    for name, value in one.items():
        if "reparam_factors" in name:
            moved = (value - start[name]).norm()
            assert moved > 0
            assert (two[name] - value).norm() < 1e-3 * moved, name


def test_a_run_in_shards_resumes(tmp_path: Path) -> None:
    steps = {**FSDP, "save_strategy": "steps", "save_steps": 2}
    launched(tmp_path / "whole", steps)
    launched(tmp_path / "resumed", {**steps, "resume": str(tmp_path / "whole" / "checkpoint-2")})
    one, two = (tmp_path / name / "saved" / "adapter_model.safetensors" for name in ("whole", "resumed"))
    assert one.read_bytes() == two.read_bytes()
