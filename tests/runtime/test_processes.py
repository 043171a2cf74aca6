"""Processes that work together: each does a part, all have everything, and none waits for one that fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.block_by_block import TEXT, WAYS, by_block
from support.compressing import IMAGES, compressed
from support.models import convnet, llama
from support.processes import run_in_processes
from torch import Tensor

from reparam_peft import Statistics
from reparam_peft.compression.job import Job
from reparam_peft.compression.one_shot import OneShot
from reparam_peft.evaluation.measures import Measure
from reparam_peft.runtime.processes import alike_in_every_process, in_every_process, share_out
from reparam_peft.runtime.run_folder import RunFolder
from reparam_peft.tuner.layer import ReparamLayer

NAMES = ["one", "three", "fifteen"]


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
    run_in_processes(run_failing_process, str(tmp_path))


def compute(name: str) -> list[Tensor]:
    return [torch.full((len(name),), float(len(name))), torch.tensor(dist.get_rank() if dist.is_initialized() else 0)]


def room(name: str) -> list[Tensor]:
    return [torch.empty(len(name)), torch.tensor(-1)]


def share(
    names: list[str], compute: Callable[[str], list[Tensor]] = compute, parts: Callable[[str], list[Tensor]] = room
) -> dict[str, list[Tensor]]:
    return share_out(names, "Counting", compute, parts, lambda name: torch.device("cpu"), progress=False)


def failing(name: str) -> list[Tensor]:
    raise ValueError("it cannot be counted.")


def run_sharing_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(share(NAMES), f"{folder}/{rank}")
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="one: it cannot" if rank == 0 else "another process"):
        share(["one"], failing)
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="one: it cannot" if rank == 1 else "another process"):
        share(["one"], parts=failing)  # of which the second process has no result of its own
    dist.destroy_process_group()


def test_one_process_does_everything() -> None:
    shared = share(NAMES)
    assert list(shared) == NAMES
    assert [len(parts[0]) for parts in shared.values()] == [3, 5, 7]
    assert share([]) == {}


def test_two_processes_do_every_other_and_both_have_all(tmp_path: Path) -> None:
    run_in_processes(run_sharing_process, str(tmp_path))
    for rank in (0, 1):
        shared = torch.load(tmp_path / str(rank))
        assert list(shared) == NAMES
        assert [parts[1].item() for parts in shared.values()] == [0, 1, 0]
        assert all(torch.equal(parts[0], torch.full((len(name),), float(len(name)))) for name, parts in shared.items())


def test_an_error_has_the_name() -> None:
    with pytest.raises(ValueError, match=r"^three: it cannot be counted"):
        share(["three"], failing)


FAILING = {
    "memory is looked at": (0, "reparam_peft.compression.passes.free_memory"),
    "targets are looked for": (1, "reparam_peft.compression.job.select_targets"),
    "targets are checked": (1, "reparam_peft.compression.block_by_block.check_targets"),
    "the run folder is opened": (0, "reparam_peft.runtime.run_folder.lock_folder"),
    "neurons are weighed": (0, "reparam_peft.compression.neurons.Neurons.offered"),
    "ranks are chosen": (1, "reparam_peft.compression.job.make_plan"),
    "inputs are replayed": (1, "reparam_peft.compression.block_by_block.Replay"),
    "a block is factorised": (1, "reparam_peft.compression.block_by_block.BlockByBlock._factorize"),
    "a block is refined": (0, "reparam_peft.compression.block_by_block.refine_block"),
    "a block is written": (0, "reparam_peft.runtime.run_folder.save_tensors"),
    "outputs are computed": (1, "reparam_peft.blockwise.streams.Stream.put"),
    "layers are put in place": (1, "reparam_peft.compression.compress.get_peft_model"),
}


def run_failing_phases(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    own = f"{folder}/own {rank}"  # which the other process does not see
    with RunFolder(own, {}) as run:
        if rank == 0:
            run.begin({})
            run.finish({}, {})
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for number, (fails, name) in enumerate(FAILING.values()):
        model = llama(num_hidden_layers=1)
        arguments = {**WAYS["both"], "run_folder": f"{folder}/run {number}"}
        with ExitStack() as stack:
            if rank == fails:
                stack.enter_context(patch(name, side_effect=OSError("out of luck")))
            error, message = (OSError, "out of luck") if rank == fails else (RuntimeError, "another process of this run")
            stack.enter_context(pytest.raises(error, match=message))
            by_block(model, TEXT[:1], arguments)
        assert not any(isinstance(module, ReparamLayer) for module in model.modules()), name
    measure = Measure("count", lambda model: float(rank), higher_is_better=True)
    assert measure.of(llama(num_hidden_layers=1)) == 0, "all have what the first has measured"
    assert in_every_process(True)
    assert not in_every_process(rank == 0)
    assert alike_in_every_process(["the same"])
    assert not alike_in_every_process(rank)
    with RunFolder(own, {}) as run:
        assert (run.plan, run.finished) == (None, []), "what one process does not see does not count"
        job, gathered = SimpleNamespace(), list[int]()
        OneShot(cast(Job, job), None, run)
        for _ in range(2):
            job.kept_statistics(["a"], lambda: gathered.append(rank) or Statistics(seed=0))
        assert len(gathered) == 2, "the second process gathers what the first one has kept, and not alone"
    dist.destroy_process_group()


def test_processes_fail_together_in_every_phase(tmp_path: Path) -> None:
    run_in_processes(run_failing_phases, str(tmp_path))
