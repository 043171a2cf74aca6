"""One-shot compression, of which statistics, the plan, and the products of each pass are kept as they are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..calibration.self_written import SelfWritten
from ..calibration.statistics import Batches, Statistics
from ..layers.product import Product, named_product, named_tensors
from ..planning.plan import Plan
from ..runtime.fingerprints import fingerprint_of_values
from ..runtime.memory import return_freed
from ..runtime.processes import fails_together, in_every_process
from ..runtime.run_folder import RunFolder
from ..tuner.targets import Target, check_targets
from .block_by_block import Result
from .grouping import gathered_by_block
from .job import Job
from .passes import bytes_of_statistics, room_beside
from .run_settings import settings_of
from .student import beside
from .waiting import waiting


class OneShot:
    """One call of `compress` without `sequential` and `refine`; the model stays as it is.

    Args:
        job: targets, statistics and metrics.
        plan: the ranks; None: the job chooses them.
        folder: of the run, which may have been killed before.
    """

    def __init__(self, job: Job, plan: Plan | None, folder: RunFolder) -> None:
        self.job, self.plan, self.folder = job, plan, folder
        if folder.folder is not None:
            job.kept_statistics = self._statistics

    def result(self, adapter_name: str) -> Result:
        """Compress everything but what an earlier call has finished."""
        job, plan, restored = self.job, self.plan, dict[str, Product]()
        with fails_together():
            if self.folder.plan is not None:
                plan = Plan.load(self.folder.plan)
                job.resume(plan, [name for entry in self.folder.finished for name in entry["factorised"]])
        if plan is None:
            job.found.room = room_beside(job.passes, job.targets, job.options.max_memory) - (job.room or 0)
            plan = job.plan()
        with fails_together():
            targets = job.ranked(plan)
            check_targets(targets, job.config, job.model, adapter_name, loading=False)
            for position, entry in enumerate(self.folder.finished):
                restored |= self._restored(position, entry["factorised"], targets)
            job.neurons.recall(restored)
        if not self.folder.finished:
            self.folder.begin(plan.to_dict())
        started = time.monotonic()

        def keep(products: dict[str, Product]) -> None:
            entry = {"factorised": list(products), "seconds": time.monotonic() - started}
            self.folder.finish(entry, named_tensors(products))

        return_freed()  # what planning took and has given back lies in holes
        made = job.products(targets, used_up=True, keep=None if self.folder.folder is None else keep)
        return Result(plan, {name: {**restored, **made}[name] for name in targets if name in restored or name in made})

    def _restored(self, position: int, names: list[str], targets: dict[str, Target]) -> dict[str, Product]:
        """The products of an earlier call."""
        tensors, products = self.folder.tensors(position), {}
        for name in names:
            target = targets[name]
            if target.rank is None:
                raise ValueError(f"{name}: `run_folder` has a product of what stays dense by its plan; delete the folder.")
            products[name] = beside(target.module, named_product(tensors, name, target.rank, target.storage))
        return products

    def _statistics(self, group: Sequence[str], gather: Callable[[], Statistics]) -> Statistics:
        """The statistics of a group of targets: of an earlier call, or gathered and kept."""
        of_group = fingerprint_of_values([self.folder.fingerprint, sorted(group)])[:16]
        path = self.folder.path(f"statistics-{of_group}.safetensors")
        kept: Statistics | None = None
        with fails_together():
            try:
                if path.exists():
                    kept = Statistics.load(path)
            except ValueError:  # damaged since it was written
                pass
        if in_every_process(kept is not None) and kept is not None:
            return kept
        kept = None  # memory holds those of one group at a time
        statistics = gather()
        with fails_together():
            if self.folder.writes:
                statistics.save(path)
        return statistics


def one_shot(job: Job, plan: Plan | None, batches: Batches, run_folder: str | Path | None, adapter_name: str) -> Result:
    """The products of a job, which go on from a folder where there is one.

    Args:
        job: of the call.
        plan: the ranks; None: the job chooses them.
        batches: that the job was given; with a folder a list, text that the model writes, or statistics.
        run_folder: as for `compress`.
        adapter_name: that the products are for.
    """
    settings = {}
    with fails_together():
        if run_folder is not None:
            read = batches if isinstance(batches, SelfWritten) else None if isinstance(batches, Statistics) else list(batches)
            settings = settings_of(job, read, plan)
    with RunFolder(run_folder, settings) as folder, ExitStack() as stack:
        stack.enter_context(gathered_by_block(job, folder.folder))
        run = OneShot(job, plan, folder)
        if folder.folder is None and plan is None and len(job.passes) > 1:
            job.kept_statistics = stack.enter_context(waiting(job.passes, bytes_of_statistics(job.targets)))
        return run.result(adapter_name)
