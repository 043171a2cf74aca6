"""Runs of several processes, which share out batches and matrices."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor
from tqdm.auto import tqdm

from .modules import naming

TOLD = "reparam_peft_told"  # attribute of errors that all processes know of


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


@contextmanager
def fails_together() -> Iterator[None]:
    """Where this block fails in one process of a distributed run, it fails in all, so that none waits for the others.

    All processes leave it together. Within it no process may wait for another.

    Raises:
        RuntimeError: in the processes that did not fail themselves.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed:
            _tell(sys.exc_info()[1])
    _hear()


@contextmanager
def tells_of_errors() -> Iterator[None]:
    """Where this block fails in one process of a distributed run, wherever that is, the others fail when they next exchange
    something, by the functions of this file.

    All processes enter it together. What they exchange in other ways must follow the end of a `fails_together` at once.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed:
            with suppress(RuntimeError):  # of processes that have gone
                _tell(sys.exc_info()[1])


def _is_told(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of the one that it was raised from."""
    return error is not None and (getattr(error, TOLD, False) or _is_told(error.__cause__))


def _tell(error: BaseException | None) -> None:
    """Let the others know that this process has failed, unless they know it."""
    if processes()[0] > 1 and not _is_told(error):
        setattr(error, TOLD, True)
        _any_failed(True)


def _hear() -> None:
    """Let the others know that this process has not failed, and raise `RuntimeError` where one of them has."""
    if processes()[0] > 1 and _any_failed(False):
        error = RuntimeError("another process of this run failed; its own message says why.")
        setattr(error, TOLD, True)
        raise error


def _any_failed(failed: bool) -> bool:
    flag = torch.tensor(int(failed), device=_device_of_messages())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def first_of(value: float) -> float:
    """A number that every process of a distributed run has computed, as the first one has it.

    Raises:
        RuntimeError: another process failed.
    """
    if processes()[0] == 1:
        return value
    _hear()
    number = torch.tensor(value, dtype=torch.float64, device=_device_of_messages())
    dist.broadcast(number, 0)
    return number.item()


def in_every_process(holds: bool) -> bool:
    """Whether what each process of a distributed run has judged by itself, such as that a file is whole, holds in all of them.

    What decides whether the processes are to exchange something has to be asked so: else some would wait for the others.

    Raises:
        RuntimeError: another process failed.
    """
    if processes()[0] == 1:
        return holds
    _hear()
    return not _any_failed(not holds)


def alike_in_every_process(value: object) -> bool:
    """Whether what each process of a distributed run has found by itself is the same in all of them, by its `repr`.

    Raises:
        RuntimeError: another process failed.
    """
    number = float(zlib.crc32(repr(value).encode()))
    return in_every_process(number == first_of(number))


def _device_of_messages() -> torch.device:
    """A device whose tensors the processes can exchange."""
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def share_out(
    names: Iterable[str],
    what: str,
    compute: Callable[[str], list[Tensor]],
    parts: Callable[[str], list[Tensor]],
    device_of: Callable[[str], torch.device],
    progress: bool,
) -> dict[str, list[Tensor]]:
    """What `compute` makes of each name; in a distributed run, each is computed by one process and handed to all.

    Of n processes, process i takes every n-th name from the i-th on. Matrices cost more to factorise than to send, so that the
    work divides by n. One result at a time is broadcast, by the process that has it, into memory that the others have made.

    Args:
        names: the same in every process, in the same order.
        what: the label of the progress bar, which the first process shows.
        compute: name → tensors. An error gets the name before its message, and all processes fail with it.
        parts: name → tensors of the shapes and dtypes of `compute(name)`, whose values do not matter: memory to receive it.
        device_of: name → where its results are, in a run of several processes.
        progress: whether to show a progress bar.

    Returns:
        Name → tensors, in the order of `names`.

    Raises:
        RuntimeError: another process failed.
    """
    names = list(names)
    if not names:
        return {}
    world, rank = processes()
    results: dict[str, list[Tensor]] = {}
    bar = tqdm(names[rank::world], desc=what, unit="matrix", delay=1, disable=None if progress and rank == 0 else True)
    with fails_together():
        for name in bar:
            with naming(name):
                results[name] = compute(name)
        for name in names if world > 1 else ():
            with naming(name):
                device = device_of(name)
                results[name] = [part.to(device) for part in results.get(name) or parts(name)]
    for index, name in enumerate(names if world > 1 else ()):
        for tensor in results[name]:
            dist.broadcast(tensor, index % world)
    return {name: results[name] for name in names}
