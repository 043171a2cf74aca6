"""A function that runs in several processes at once, as in a distributed run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

# One server for each process of pytest imports the libraries, which takes longer than the tests; what it forks has no threads.
multiprocessing.set_forkserver_preload(["reparam_peft"])


def run_in_processes(function: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Call `function(rank, *args)` in each of so many processes, and wait; an error in one is raised here."""
    start_processes(function, args, nprocs=count, start_method="forkserver")
