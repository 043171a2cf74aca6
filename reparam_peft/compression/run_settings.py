"""All that the result of a run depends on, by which its folder knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..blockwise.anchoring import Anchoring
from ..blockwise.refinement import Refinement
from ..calibration.given import Objective
from ..calibration.self_written import SelfWritten
from ..calibration.statistics import Statistics
from ..planning.plan import Plan
from ..runtime.fingerprints import (
    fingerprint_of_batches,
    fingerprint_of_config,
    fingerprint_of_model,
    fingerprint_of_values,
)
from ..runtime.run_folder import json_able
from .job import Job


def settings_of(
    job: Job,
    batches: Sequence[Mapping[str, Any]] | SelfWritten | None,
    plan: Plan | None,
    anchoring: Anchoring | None = None,
    refinement: Refinement | None = None,
) -> dict[str, Any]:
    """What `RunFolder` compares.

    Args:
        job: of the run.
        batches: that are read; None where statistics are all that is.
        plan: that was given; None: the run chooses the ranks.
        anchoring, refinement: how it goes block by block; None: it does not.
    """
    text = batches.fingerprint() if isinstance(batches, SelfWritten) else batches and fingerprint_of_batches(batches)
    return {
        "config": json_able(job.config.to_dict()),
        "sequential": None if anchoring is None else asdict(anchoring),
        "refine": None if refinement is None else asdict(refinement),
        "seed": job.seed,
        "model": fingerprint_of_model(job.model),
        "model's config": fingerprint_of_config(job.model),
        "batches": text,
        "plan": None if plan is None else fingerprint_of_values(plan.to_dict()),
        "objective": _name_of(job.options.objective),
        "statistics": job.batches.fingerprint() if isinstance(job.batches, Statistics) else None,
    }


def _name_of(objective: Objective | None) -> str | None:
    """Where a function is defined, and a class where another object is called; which is all that is known of it."""
    if objective is None:
        return None
    named: Any = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"
