"""Runs of several processes, which share out batches and matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard


def processes() -> tuple[int, int]:
    """How many processes a distributed run has, and which of them this is; (1, 0) elsewhere."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)


def check_whole(batches: object) -> None:
    """Raise `ValueError` where each process of a distributed run has batches of its own."""
    if processes()[0] > 1 and isinstance(batches, (DataLoaderShard, DataLoaderDispatcher)):
        raise ValueError(
            "`batches` were shared out among the processes by accelerate already; give every process the DataLoader that was "
            "not prepared."
        )


def together() -> None:
    """Wait for all processes of a distributed run."""
    if processes()[0] > 1:
        dist.barrier()


@contextmanager
def fails_together(device: torch.device) -> Iterator[None]:
    """Where this block fails in one process of a distributed run, it fails in all, so that none waits for the others.

    Raises:
        RuntimeError: in the processes that did not fail themselves.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if processes()[0] > 1:
            flag = torch.tensor(int(failed), device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if flag and not failed:
                raise RuntimeError("another process of this run failed; its own message says why.")
