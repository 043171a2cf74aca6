"""Whether statistics that do not fit together are gathered block by block, or by passes over the whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from ..blockwise.courses import Course, course_of
from ..blockwise.gathering import BlockwiseGatherer
from ..calibration.statistics import Statistics
from ..runtime.blocks import block_of, find_blocks
from ..runtime.modules import uncompiled
from ..runtime.processes import in_every_process
from .job import Job
from .passes import passes_by_block, room_for_graphs
from .waiting import has_room, place_for

logger = logging.getLogger(__name__)


@contextmanager
def gathered_by_block(job: Job, folder: Path | None = None) -> Iterator[None]:
    """Within this block a job whose statistics do not fit together gathers them block by block, from files.

    However many groups there are, that takes two passes forward and one backward, where groups take a pass in both directions
    each. A job stays with its groups where that takes no fewer passes, where the statistics would not be the same
    (`courses.course_of`) or are of an objective, where an MLP lies across blocks, and where no disk has room for what blocks
    give. Where a later batch takes another course through the blocks, each of the groups, which lie within blocks, takes a
    pass. All processes enter it together.

    Args:
        job: of a call, which has gathered nothing yet.
        folder: of a run, for what blocks give; None: the system's temporary folder, unless that is itself in memory.
    """
    planned = _planned(job)
    with ExitStack() as stack:
        gatherer = None if planned is None else _gatherer(planned, folder)
        if gatherer is not None:
            stack.enter_context(gatherer)
        if in_every_process(gatherer is not None) and planned is not None and gatherer is not None:
            stack.enter_context(uncompiled(job.model))
            job.regroup(planned.passes)
            before, job.gather = job.gather, gatherer.gather
            stack.callback(setattr, job, "gather", before)
        yield


class _Planned(NamedTuple):
    """The course of the batches, the bytes that are kept of them, and groups within blocks."""

    course: Course
    size: int
    passes: list[list[str]]


def _gatherer(planned: _Planned, folder: Path | None) -> BlockwiseGatherer | None:
    """What gathers block by block; None where no disk has room, or the folder cannot be used."""
    course, size, _ = planned
    try:
        place = place_for(size) if folder is None else folder if has_room(folder, size) else None
        gatherer = None if place is None else BlockwiseGatherer(course.replay.blocks, place, course)
    except (OSError, ValueError) as error:
        logger.info("Statistics are not gathered block by block, because the folder cannot be used: %s", error)
        return None
    if gatherer is not None:
        logger.info(
            "Statistics are gathered block by block; what %d blocks give takes %s bytes in %s.",
            len(course.replay.order), f"{size:,}", place,
        )  # fmt: skip
    return gatherer


def _planned(job: Job) -> _Planned | None:
    """How the statistics of a job are gathered block by block; None: the job stays as it is."""
    max_memory = job.options.max_memory
    if max_memory is None or len(job.passes) < 2 or isinstance(job.batches, Statistics) or job.options.objective is not None:
        return None
    try:
        blocks = find_blocks(job.model)
    except ValueError:
        return None
    mlps = list(job.neurons.mlps.values())
    if any(len({block_of(name, blocks) for name in mlp.names}) > 1 for mlp in mlps):
        return None
    parameters = job.config.target_parameters or ()
    passes = passes_by_block(job.targets, max_memory, list(blocks), mlps, parameters)
    if 1 + sum(block_of(group[0], blocks) is None for group in passes) >= len(job.passes):
        return None
    room = room_for_graphs(passes, job.targets, max_memory)
    found = course_of(job.model, blocks, job.batches, job.modules.values(), job.weigher.gradients, room)
    if found is None:
        return None
    course, size = found
    backwards = [*course.replay.unreached, *reversed(course.replay.order)]
    return _Planned(course, size, passes_by_block(job.targets, max_memory, backwards, mlps, parameters))
