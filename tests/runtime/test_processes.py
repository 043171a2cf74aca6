"""Processes that work together: none waits for one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.compressing import IMAGES, compressed
from support.models import convnet
from torch import multiprocessing


def run_failing_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batches = [{"x": batch["x"].clone()} for batch in IMAGES[:2]]
    batches[1]["x"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="NaN" if rank == 1 else "another process"):
        compressed(convnet(), batches, target_modules=["conv0", "conv1"])
    dist.destroy_process_group()


def test_no_process_waits_for_one_that_fails(tmp_path: Path) -> None:
    assert len(IMAGES) >= 2
    multiprocessing.spawn(run_failing_process, (str(tmp_path),), nprocs=2)
