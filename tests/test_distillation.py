"""The divergence from a teacher, and the teacher's answers kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import text
from support.healing import BERT, ROWS, losses, padded, small, stacked, trainer
from support.models import classifier, llama, masked_lm, t5
from torch import nn

from reparam_peft.healing.losses import Sparse, divergence

# The divergence


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


# What is kept


@pytest.fixture
def counted() -> tuple[nn.Module, list[int]]:
    teacher, calls = llama(), []
    teacher.register_forward_hook(lambda module, args, output: calls.append(1))
    return teacher, calls


def test_the_teacher_runs_once_for_each_row(counted: Any, tmp_path: Path) -> None:
    teacher, calls = counted
    options = {"teacher": teacher, "teacher_cache": tmp_path / "cache", "top_k": 100, "num_train_epochs": 2, "max_steps": -1}
    made = trainer(tmp_path, rows=ROWS[:8], **options)
    made.train()
    assert len(calls) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 8
    exact = trainer(tmp_path, rows=ROWS[:8], num_train_epochs=2, max_steps=-1)
    exact.train()
    assert losses(made) == pytest.approx(losses(exact), rel=1e-3)
    other = llama()
    other.lm_head.weight.data.mul_(2)
    trainer(tmp_path, rows=ROWS[:4], **{**options, "teacher": other}).train()
    assert len(list((tmp_path / "cache").iterdir())) == 12, "another teacher has files of its own"


def test_padding_does_not_change_what_is_kept_and_damage_is_repaired(counted: Any, tmp_path: Path) -> None:
    teacher, calls = counted
    made = trainer(tmp_path, teacher=teacher, teacher_cache=tmp_path / "cache", top_k=20)
    made.model.eval()
    batch = text([9, 5], 9, seed=3)
    first = made.compute_loss(made.model, batch)
    assert len(calls) == 1
    longer = {key: F.pad(value, (0, 4)) for key, value in batch.items()}
    assert float(made.compute_loss(made.model, longer)) == pytest.approx(float(first), rel=1e-4)
    assert len(calls) == 1
    path = next((tmp_path / "cache").iterdir())
    path.write_bytes(path.read_bytes()[:50])
    assert float(made.compute_loss(made.model, batch)) == pytest.approx(float(first), rel=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["classifier", "masked", "encoder-decoder"])
def test_cache_of_other_models(kind: str, tmp_path: Path) -> None:
    build = {"classifier": classifier, "masked": masked_lm, "encoder-decoder": t5}[kind]
    rows = padded((16, 15, 3, 4))
    if kind == "classifier":
        rows = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
    if kind == "encoder-decoder":
        rows = [{**row, "labels": row["input_ids"][:8]} for row in rows]
    options = BERT if kind != "encoder-decoder" else {"target_modules": ["q", "k", "v", "o"]}
    model = small(build, **options)
    cached = trainer(tmp_path, model, rows, teacher=build(), teacher_cache=tmp_path / "cache", top_k=100)
    plain = trainer(tmp_path, model, rows, teacher=build())
    model.eval()
    batch = stacked(rows)
    expected = float(plain.compute_loss(model, dict(batch)).detach())
    for _ in range(2):
        assert float(cached.compute_loss(model, dict(batch)).detach()) == pytest.approx(expected, rel=1e-3)
    if kind == "encoder-decoder":
        other = {**batch, "labels": batch["labels"].flip(1)}
        expected = float(plain.compute_loss(model, dict(other)).detach())
        assert float(cached.compute_loss(model, dict(other)).detach()) == pytest.approx(expected, rel=1e-3)


def test_gaps_in_a_mask_are_part_of_the_key(tmp_path: Path) -> None:
    made = trainer(tmp_path, teacher_cache=tmp_path / "cache", top_k=100)
    plain = trainer(tmp_path)
    made.model.eval()
    for ids, mask in (([5, 6, 7, 8], [1, 1, 1, 1]), ([5, 6, 50, 7, 8], [1, 1, 0, 1, 1]), ([3, 5, 6, 7, 8], [0, 1, 1, 1, 1])):
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        expected = float(plain.compute_loss(made.model, dict(batch)).detach())
        assert float(made.compute_loss(made.model, dict(batch)).detach()) == pytest.approx(expected, rel=1e-3)
