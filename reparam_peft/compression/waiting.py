"""Statistics of groups of targets that wait on disk, from planning to factorising, while those of other groups are gathered."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import psutil

from ..calibration.statistics import Statistics
from ..runtime.files import Scratch
from ..runtime.processes import processes

IN_MEMORY = ("tmpfs", "ramfs")  # file systems, whose files would take the memory that `max_memory` spares

logger = logging.getLogger(__name__)

Keep: TypeAlias = Callable[[Sequence[str], Callable[[], Statistics]], Statistics]


@contextmanager
def waiting(passes: Sequence[Sequence[str]], size: int) -> Iterator[Keep | None]:
    """Within this block statistics that were gathered once are read from a temporary folder, those of the last group but.

    A second pass over the data takes as long as all the rest. The folder is in the system's (`TMPDIR`).

    Args:
        passes: names of targets, in the order in which their statistics are gathered.
        size: bytes that all of them take, at most.

    Yields:
        (group, a function that gathers its statistics) → the statistics; None, where the system's temporary folder has no room
        for them and as much again, cannot be written or is itself in memory, or in a run of several processes: then they have
        to be gathered again.
    """
    made = None if processes()[0] > 1 else _folder(size)
    if made is None:
        yield None
        return
    numbers = {tuple(group): number for number, group in enumerate(passes)}
    with made as folder:

        def keep(group: Sequence[str], gather: Callable[[], Statistics]) -> Statistics:
            number = numbers[tuple(group)]
            path = folder / f"{number}.safetensors"
            try:
                if path.exists():
                    return Statistics.load(path)
            except (ValueError, OSError) as error:  # damaged while they waited, or gone
                logger.info("Statistics are gathered again, because they could not be read: %s", error)
            statistics = gather()
            if number < len(numbers) - 1:  # those of the last group are at hand as factorising begins
                try:
                    statistics.save(path)
                except OSError as error:
                    logger.info("Statistics are gathered again, because they could not be kept: %s", error)
            return statistics

        yield keep


def _folder(size: int) -> Scratch | None:
    """A temporary folder for so many bytes; None where there is no place for one."""
    place = place_for(size)
    try:
        return None if place is None else Scratch(place, "reparam")
    except (OSError, ValueError) as error:
        logger.info("Statistics are gathered again, because the temporary folder cannot be used: %s", error)
        return None


def place_for(size: int) -> Path | None:
    """The system's temporary folder, where it is on a disk with room for so many bytes and as much again; else None."""
    try:
        system = Path(tempfile.gettempdir()).resolve()
        disks = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
        kind = next((disks[folder] for folder in (system, *system.parents) if folder in disks), "")
        return None if kind in IN_MEMORY or not has_room(system, size) else system
    except OSError as error:
        logger.info("The system's temporary folder cannot be used: %s", error)
        return None


def has_room(folder: Path, size: int) -> bool:
    """Whether the disk of a folder has room for so many bytes and as much again."""
    return shutil.disk_usage(folder).free >= 2 * size
