"""What a run folder compares: everything that the result depends on changes it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compressing import TEXT, config_of
from support.models import llama

from reparam_peft import calibrate
from reparam_peft.blockwise.anchoring import Anchoring
from reparam_peft.blockwise.refinement import Refinement
from reparam_peft.compression.job import Job
from reparam_peft.compression.options import Options
from reparam_peft.compression.run_settings import settings_of


def settings(batches: Any = TEXT, seed: int = 0, scale: float = 1.0, objective: Any = None, **options: Any) -> dict[str, Any]:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight *= scale
    config = config_of(**{"target_modules": "all-linear", **options})
    job = Job.of_model(model, config, batches, Options(seed, progress=False, objective=objective))
    return settings_of(job, batches if isinstance(batches, list) else None, None)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"keep": 0.7}, "config"),
        ({"seed": 1}, "seed"),
        ({"scale": 2.0}, "model"),
        ({"batches": TEXT[:1]}, "batches"),
        ({"objective": settings}, "objective"),
    ],
)
def test_what_the_result_depends_on_changes_them(changed: dict[str, Any], key: str) -> None:
    before, after = settings(), settings(**changed)
    assert before == settings()
    assert {name for name in before if before[name] != after[name]} == {key}


def test_statistics_and_steps_are_part_of_them() -> None:
    known = calibrate(llama(), config_of(target_modules="all-linear"), TEXT, progress=False)
    given = settings(known)
    assert (given["batches"], given["statistics"]) == (None, known.fingerprint())
    job = Job.of_model(llama(), config_of(target_modules="all-linear"), TEXT, Options(0, progress=False))
    by_block = settings_of(job, TEXT, None, Anchoring(), Refinement())
    assert by_block["sequential"] != by_block["refine"] != settings()["refine"]
