"""The teacher's answers, kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from support.batches import text
from support.healing import BERT, ROWS, losses, padded, small, stacked, trainer
from support.models import classifier, llama, masked_lm, t5
from torch import nn


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


@pytest.mark.parametrize("damage", ["shape", "NaN", "classes", "names", "empty"])
def test_rows_that_are_not_as_they_were_written_are_computed_anew(damage: str, counted: Any, tmp_path: Path) -> None:
    teacher, calls = counted
    made = trainer(tmp_path, teacher=teacher, teacher_cache=tmp_path / "cache", top_k=20)
    made.model.eval()
    batch = text([9], 9, seed=3)
    expected = float(made.compute_loss(made.model, batch).detach())
    (path,) = (tmp_path / "cache").iterdir()
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    indices, log_p = tensors["indices"], tensors["log_probabilities"]
    changed = {
        "shape": {"indices": indices[:-1].clone(), "log_probabilities": log_p[:-1].clone()},
        "NaN": {"indices": indices, "log_probabilities": log_p * torch.nan},
        "classes": {"indices": indices + 10**6, "log_probabilities": log_p},
        "names": {"indices": indices, "probabilities": log_p},
        "empty": {},
    }
    save_file(changed[damage], path, metadata)
    for _ in range(2):
        assert float(made.compute_loss(made.model, batch).detach()) == pytest.approx(expected, rel=1e-6)
    assert len(calls) == 2, "computed anew, and kept"


def test_a_teacher_of_nan_teaches_nothing(tmp_path: Path) -> None:
    teacher = llama()
    teacher.lm_head.weight.data.fill_(torch.nan)
    made = trainer(tmp_path, teacher=teacher, teacher_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="outputs of the teacher are NaN"):
        made.compute_loss(made.model, text([9], 9, seed=3))
    assert not list((tmp_path / "cache").iterdir())


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


def test_compressed_teachers_have_files_of_their_own(tmp_path: Path) -> None:
    for teacher, files in ((small(keep=0.5), 1), (small(keep=0.6), 2)):
        made = trainer(tmp_path, teacher=teacher, teacher_cache=tmp_path / "cache", top_k=20)
        made.compute_loss(made.model, text([9], 9, seed=3))
        assert len(list((tmp_path / "cache").iterdir())) == files
