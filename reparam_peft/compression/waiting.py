"""Statistics of groups of targets that wait on disk, from planning to factorising, while those of other groups are gathered."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from ..calibration.statistics import Statistics
from ..runtime.processes import processes

logger = logging.getLogger(__name__)

Keep: TypeAlias = Callable[[Sequence[str], Callable[[], Statistics]], Statistics]


@contextmanager
def waiting(passes: Sequence[Sequence[str]], size: int) -> Iterator[Keep | None]:
    """Within this block statistics that were gathered once are read from a temporary folder, those of the last group but.

    A second pass over the data takes as long as all the rest. The folder is the system's (`TMPDIR`).

    Args:
        passes: names of targets, in the order in which their statistics are gathered.
        size: bytes that all of them take, at most.

    Yields:
        (group, a function that gathers its statistics) → the statistics; None, where the system has no temporary folder with
        room for them and as much again, or in a run of several processes: then they have to be gathered again.
    """
    temporary = _folder(2 * size) if processes()[0] == 1 else None
    if temporary is None:
        yield None
        return
    numbers = {tuple(group): number for number, group in enumerate(passes)}
    with temporary as folder:

        def keep(group: Sequence[str], gather: Callable[[], Statistics]) -> Statistics:
            number = numbers[tuple(group)]
            path = Path(folder) / f"{number}.safetensors"
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


def _folder(room: int) -> tempfile.TemporaryDirectory[str] | None:
    """A new temporary folder of the system's; None where there is none with so many bytes free, or it cannot be made."""
    try:
        is_wide = shutil.disk_usage(tempfile.gettempdir()).free >= room
        return tempfile.TemporaryDirectory(prefix="reparam-", ignore_cleanup_errors=True) if is_wide else None
    except OSError as error:
        logger.info("Statistics do not wait on disk: %s", error)
        return None
