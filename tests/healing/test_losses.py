"""The losses of healing: the divergence from a teacher, the task's own loss and hidden states, padding apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import text
from support.healing import BERT, LENGTH, ROWS, arguments, falls, small, stacked, trainer
from support.models import classifier, llama, t5
from torch import Tensor, nn

from reparam_peft import HealingTrainer
from reparam_peft.healing.losses import Sparse, divergence


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_divergence_is_torchs(dtype: torch.dtype, temperature: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("reparam_peft.healing.losses.CHUNK", {"cpu": 50})
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 7, 20, dtype=torch.float64).to(dtype) for _ in range(2))
    student.requires_grad_()
    mask = torch.rand(3, 7) < 0.6
    ours = 2.5 * divergence(student, teacher, mask, temperature)
    (grad,) = torch.autograd.grad(ours, student)
    wide = student.detach().double().requires_grad_()
    kl = F.kl_div(
        (wide / temperature).log_softmax(-1),
        (teacher.double() / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    expected = 2.5 * temperature**2 * kl[mask].sum()
    (wanted,) = torch.autograd.grad(expected, wide)
    assert float(ours) == pytest.approx(float(expected), rel=1e-10 if dtype == torch.float64 else 1e-5)
    assert (grad.double() - wanted).norm() <= (1e-10 if dtype == torch.float64 else 1e-2) * wanted.norm()


def test_sparse_divergence_is_over_the_k_and_the_rest() -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    log_p, indices = torch.randn(6, 20, dtype=torch.float64).log_softmax(-1).topk(4)
    ours = divergence(student, Sparse(indices, log_p))
    log_q = student.log_softmax(-1)
    chosen = log_q.gather(-1, indices)
    rest_p, rest_q = 1 - log_p.exp().sum(-1), 1 - chosen.exp().sum(-1)
    expected = (log_p.exp() * (log_p - chosen)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()
    assert float(ours) == pytest.approx(float(expected), rel=1e-10)
    one, two = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, expected))
    assert (one - two).norm() <= 1e-10 * two.norm()


def test_a_student_that_diverges_does_not_look_healed() -> None:
    student = torch.full((3, 5), torch.nan)
    assert torch.isnan(divergence(student, torch.randn(3, 5)))
    assert torch.isnan(divergence(torch.randn(3, 5), student))


def reference_loss(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """KL by PyTorch in float64, mean over the positions whose next token is real."""
    student, target = model(**batch).logits[:, :-1].double(), teacher(**batch).logits[:, :-1].double()
    kl = F.kl_div(
        (student / temperature).log_softmax(-1), (target / temperature).log_softmax(-1), log_target=True, reduction="none"
    )
    mask = batch["attention_mask"][:, 1:].bool()
    return temperature**2 * kl.sum(-1)[mask].mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_and_falls(temperature: float, tmp_path: Path) -> None:
    made = trainer(tmp_path, temperature=temperature, max_steps=30)
    batch = {**text([16, 9, 16, 4], 16, seed=7)}
    made.model.eval()
    expected = reference_loss(made.model, llama(), batch, temperature)
    assert float(made.compute_loss(made.model, batch)) == pytest.approx(float(expected), rel=1e-4)
    made.train()
    assert falls(made)


@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_the_tasks_own_loss_is_mixed_in(distillation: float, tmp_path: Path) -> None:
    made = trainer(tmp_path, distillation=distillation)
    made.model.eval()
    batch = text([16, 9], 16, seed=7)
    own = made.model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    expected = distillation * reference_loss(made.model, llama(), batch) + (1 - distillation) * own
    assert float(made.compute_loss(made.model, batch)) == pytest.approx(float(expected), rel=1e-4)


def test_the_tasks_own_loss_is_that_of_the_trainer(tmp_path: Path) -> None:
    batch = text([16, 9], 16, seed=7)
    smooth = trainer(tmp_path, distillation=0.0, label_smoothing_factor=0.2)
    smooth.model.eval()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    logits = smooth.model(**batch).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    assert float(smooth.compute_loss(smooth.model, batch)) == pytest.approx(float(expected), rel=1e-4)
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0 + 7.0}
    made = HealingTrainer(small(), arguments(tmp_path), train_dataset=ROWS, teacher=llama(), distillation=0.0, **own)
    assert float(made.compute_loss(made.model, batch)) == 7.0
    for options in (own, {"args": arguments(tmp_path, label_smoothing_factor=0.1)}):
        with pytest.raises(ValueError, match="are of the task's own loss, which has no part in `distillation=1`"):
            HealingTrainer(small(), **{"args": arguments(tmp_path), **options}, train_dataset=ROWS, teacher=llama())


def test_labels_say_which_positions_count(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.model.eval()
    batch = text([16, 16], 16, seed=7)
    labels = batch["input_ids"].clone()
    labels[:, :10] = -100
    kl = reference_rows(made.model, batch)[:, 9:].mean()
    assert float(made.compute_loss(made.model, {**batch, "labels": labels})) == pytest.approx(float(kl), rel=1e-4)


def reference_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    student, target = (m(**batch).logits[:, :-1].double().log_softmax(-1) for m in (model, llama()))
    return F.kl_div(student, target, log_target=True, reduction="none").sum(-1)


def test_hidden_states_are_matched_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, hidden=2.0, distillation=0.0, max_steps=20)
    made.model.eval()
    batch = text([16, 9], 16, seed=7)
    plain = trainer(tmp_path, made.model, distillation=0.0)
    ours = made.model(**batch, output_hidden_states=True).hidden_states[1:]
    theirs = llama()(**batch, output_hidden_states=True).hidden_states[1:]
    mask = batch["attention_mask"][:, 1:].bool()  # as for logits, positions whose next token is real
    both = [(a[:, :-1], b[:, :-1]) for a, b in zip(ours, theirs, strict=True)]
    errors = [((a - b).square().sum(-1) / b.square().sum(-1))[mask].mean() for a, b in both]
    expected = plain.compute_loss(made.model, batch) + 2.0 * torch.stack(errors).mean()
    assert float(made.compute_loss(made.model, batch)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["classifier", "encoder-decoder"])
def test_hidden_error_does_not_see_padding(kind: str, tmp_path: Path) -> None:
    build = {"classifier": classifier, "encoder-decoder": t5}[kind]
    options = BERT if kind == "classifier" else {"target_modules": ["q", "k", "v", "o"]}
    model = small(build, **options)
    made = trainer(tmp_path, model, teacher=build(), hidden=1.0)
    model.eval()
    batch = text([9, 5], 9, seed=3)
    longer = {key: F.pad(value, (0, 4)) for key, value in batch.items()}
    if kind == "encoder-decoder":
        labels = batch["input_ids"][:, :9]
        batch, longer = {**batch, "labels": labels}, {**longer, "labels": labels}
    first, second = (float(made.compute_loss(model, b).detach()) for b in (batch, longer))
    assert first == pytest.approx(second, rel=1e-4)


def test_a_batch_whose_labels_are_all_ignored_adds_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, distillation=0.5)
    batch = {**stacked(ROWS[:2]), "labels": torch.full((2, LENGTH), -100)}
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.model.parameters())


def test_missing_labels_are_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, small(classifier, **BERT), teacher=classifier(), distillation=0.5)
    with pytest.raises(ValueError, match="`distillation` below 1 needs"):
        made.compute_loss(made.model, stacked(ROWS[:2]))
