"""Work that processes share out: each does a part, and all have everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from reparam_peft.runtime.processes import share_out

NAMES = ["one", "three", "fifteen"]


def compute(name: str) -> list[Tensor]:
    return [torch.full((len(name),), float(len(name))), torch.tensor(dist.get_rank() if dist.is_initialized() else 0)]


def share(names: list[str], compute=compute) -> dict[str, list[Tensor]]:
    def parts(name: str) -> list[Tensor]:
        return [torch.empty(len(name)), torch.tensor(-1)]

    return share_out(names, "Counting", compute, parts, lambda name: torch.device("cpu"), progress=False)


def failing(name: str) -> list[Tensor]:
    raise ValueError("it cannot be counted.")


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(share(NAMES), f"{folder}/{rank}")
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="one: it cannot" if rank == 0 else "another process"):
        share(["one"], failing)
    dist.destroy_process_group()


def test_one_process_does_everything() -> None:
    shared = share(NAMES)
    assert list(shared) == NAMES
    assert [len(parts[0]) for parts in shared.values()] == [3, 5, 7]
    assert share([]) == {}


def test_two_processes_do_every_other_and_both_have_all(tmp_path: Path) -> None:
    multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        shared = torch.load(tmp_path / str(rank))
        assert list(shared) == NAMES
        assert [parts[1].item() for parts in shared.values()] == [0, 1, 0]
        assert all(torch.equal(parts[0], torch.full((len(name),), float(len(name)))) for name, parts in shared.items())


def test_an_error_has_the_name() -> None:
    with pytest.raises(ValueError, match=r"^three: it cannot be counted"):
        share(["three"], failing)
