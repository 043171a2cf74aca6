"""Statistics that do not fit together are gathered block by block where that takes fewer passes, and gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.compressing import IMAGES, TEXT, config_of
from support.models import bert, convnet, llama
from torch import nn

from reparam_peft.blockwise import gathering
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.compression import grouping
from reparam_peft.compression.grouping import gathered_by_block
from reparam_peft.compression.job import Job
from reparam_peft.compression.options import Options
from reparam_peft.compression.passes import MaxMemory

BLOCKS = ["model.layers.0.", "model.layers.1."]


def job_of(model: nn.Module, batches: Any = TEXT, memory: int = 400_000, objective: Any = None, **options: Any) -> Job:
    config = config_of(**{"target_modules": "all-linear", "neurons": False, **options})
    within = MaxMemory(memory, is_asked_for=True)
    return Job.of_model(model, config, batches, Options(progress=False, max_memory=within, objective=objective))


def test_groups_lie_within_blocks_from_the_last_on(tmp_path: Path) -> None:
    job = job_of(llama())
    whole = sorted(name for group in job.passes for name in group)
    with gathered_by_block(job, tmp_path):
        assert job.gather != gather_statistics
        assert sorted(name for group in job.passes for name in group) == whole
        which = [{name[:15] for name in group} for group in job.passes]
        assert which == [{BLOCKS[1]}] * (len(which) // 2) + [{BLOCKS[0]}] * (len(which) // 2)
        assert list(tmp_path.glob(".activations*"))
        assert job.plan().ranks == job_of(llama(), memory=10**9).plan().ranks
    assert not list(tmp_path.iterdir())


def test_targets_outside_of_blocks_come_first() -> None:
    job = job_of(bert(), memory=200_000)
    with gathered_by_block(job):
        assert sorted(job.passes[0]) == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize("case", ["fits", "no blocks", "no room", "no folder", "across", "an objective"])
def test_else_groups_stay_as_they_are(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "no blocks":
        job = job_of(convnet(), IMAGES, 43_200, target_modules=["conv0", "conv1"])
    else:
        objective = (lambda model, batch: model(**batch).logits) if case == "an objective" else None
        memory = 10**9 if case == "fits" else 400_000
        job = job_of(llama(), memory=memory, objective=objective, neurons=case == "across" or None)
    if case == "no room":
        monkeypatch.setattr(grouping, "place_for", lambda size: None)
    if case == "across":
        monkeypatch.setattr(grouping, "block_of", lambda name, blocks: name)
    passes = job.passes
    (tmp_path / "file").touch()
    with gathered_by_block(job, tmp_path / "file" if case == "no folder" else None):
        assert job.passes == passes
        assert job.gather == gather_statistics


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
def test_batches_that_take_another_course_are_gathered_by_whole_passes(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise error("batch 1 does not reach this block")

    monkeypatch.setattr(gathering, "Tape", fails)
    job, expected = job_of(llama()), job_of(llama(), memory=10**9)
    with gathered_by_block(job):
        assert isinstance(job.gather.__self__, BlockwiseGatherer)  # type: ignore[attr-defined]
        assert job.plan().ranks == expected.plan().ranks
