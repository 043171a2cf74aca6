"""Records of sums: they add up as the rows that they are of do, and tell what does not belong into them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.batches import text
from support.models import llama
from support.processes import run_in_processes
from torch import Tensor, nn
from torch import distributed as dist

from reparam_peft import Statistics
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration import sums
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.calibration.sums import InputSums, OutputSums, WeightedSums, output_shape
from reparam_peft.numerics.grams import pack
from reparam_peft.runtime.blocks import find_blocks

CPU = torch.device("cpu")
INPUT, OUTPUT, WEIGHTED = InputSums.zeros(3, CPU, False), OutputSums.zeros(2, 3, CPU), WeightedSums.zeros(3, CPU)


def sums_of(X: Tensor, weights: Tensor | None = None) -> InputSums:
    """The sums over rows, by their definition."""
    X = X.double()
    weighted = None
    if weights is not None:
        weighted = WeightedSums(float(weights.sum()), pack((X * weights[:, None]).mT @ X), weights @ X)
    return InputSums(len(X), pack(X.mT @ X), X.sum(0), weighted)


def assert_equal(one: InputSums, two: InputSums) -> None:
    assert one.rows == two.rows
    expected = dict(two.tensors())
    assert dict(one.tensors()).keys() == expected.keys()
    for name, tensor in one.tensors():
        torch.testing.assert_close(tensor, expected[name])


def test_records_of_parts_add_up_to_that_of_the_whole_and_stay() -> None:
    X, weights = torch.randn(7, 3), torch.rand(7, dtype=torch.float64)
    one, two = sums_of(X[:4], weights[:4]), sums_of(X[4:], weights[4:])
    before = [tensor.clone() for _, tensor in one.tensors()]
    whole = sums_of(X, weights)
    assert_equal(one + two, whole)
    assert (one + two).weighted.weight == pytest.approx(whole.weighted.weight)
    assert all(torch.equal(tensor, old) for (_, tensor), old in zip(one.tensors(), before, strict=True))
    assert_equal(InputSums.zeros(3, CPU, False) + one, one)


def test_weighted_sums_of_one_part_only_are_those_of_the_whole() -> None:
    X, weights = torch.randn(7, 3), torch.rand(4, dtype=torch.float64)
    one, two = sums_of(X[:4], weights), sums_of(X[4:])
    for added in (one + two, two + one):
        assert torch.equal(added.weighted.gram, one.weighted.gram)
    assert (two + two).weighted is None


def test_matrices_are_those_that_are_packed() -> None:
    X = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(sums_of(X).matrix(), X.mT @ X)
    diagonal = InputSums.zeros(5, CPU, one_hot=True)
    assert diagonal.matrix().shape == (5,)
    assert diagonal.size == sums_of(X).size == 5
    assert OutputSums.zeros(4, 3, CPU).size == 4


def test_of_very_wide_outputs_the_diagonal_is_kept_and_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Y = torch.randn(7, 12)
    whole = OutputSums.zeros(12, 2, CPU)
    monkeypatch.setattr(sums, "WHOLE_BYTES", 8 * 12 * 13 // 2 - 1)
    assert output_shape(12, 1) == (12,)
    assert output_shape(12, 2) == whole.gram.shape  # which is in proportion to the weight
    one, two = OutputSums.zeros(12, 1, CPU), OutputSums.zeros(12, 1, CPU)
    whole.add(Y)
    one.add(Y[:4])
    two.add(Y[4:])
    expected = Y.double().square().sum(0)
    for added in (one + two, one + replace(two, gram=pack(two.matrix().diag())), whole):
        added.check()
        assert (added.rows, added.size) == (7, 12)
        torch.testing.assert_close(added.diagonal(), expected, rtol=1e-5, atol=0)
    assert (one + two).matrix().shape == (12,)


@pytest.mark.parametrize(
    "record",
    [
        replace(INPUT, rows=0),
        replace(INPUT, rows=1.0),
        replace(INPUT, rows=1, gram=torch.zeros(3, 3, dtype=torch.float64)),
        replace(INPUT, rows=1, gram=torch.zeros(2, 3)),
        replace(INPUT, rows=1, sum=torch.full((3,), torch.nan, dtype=torch.float64)),
        replace(INPUT, rows=1, weighted=WeightedSums.zeros(4, CPU)),
        replace(INPUT, rows=1, weighted=replace(WEIGHTED, weight=-1.0)),
        replace(INPUT, rows=1, weighted=replace(WEIGHTED, weight=float("nan"))),
        replace(OUTPUT, rows=-1),
        replace(OUTPUT, gradient_tokens=True),
        replace(OUTPUT, energies=torch.zeros(3, dtype=torch.float64)),
        replace(OUTPUT, gram=torch.zeros(2, 2, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_told(record: InputSums | OutputSums) -> None:
    with pytest.raises(ValueError, match=r" is -?\d| is True| is 1\.0| is nan|shape|float64"):
        record.check()


@pytest.mark.parametrize("record", [replace(INPUT, rows=1, weighted=WEIGHTED), OUTPUT])
def test_what_fits_is_let_pass(record: InputSums | OutputSums) -> None:
    record.check()


# Two processes


class Routed(nn.Module):
    """A model that takes one of two experts for a batch, so that the batches of a process may never reach the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.experts[int(x[0, 0] > 0)](h) + h


def gather(model: nn.Module) -> dict[str, Tensor]:
    """All sums of four batches, of which those of even and of odd numbers take other experts."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(5, 4, generator=generator)} for _ in range(4)]
    for index, batch in enumerate(batches):
        batch["x"][0, 0] = (-1.0) ** index
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return named_sums(gather_statistics(model, modules, batches, progress=False))


def by_block() -> dict[str, Tensor]:
    """All sums of the last block of a Llama, run block by block on three batches."""
    model = llama()
    named = model.model.layers[1].named_modules(prefix="model.layers.1")
    modules = {name: module for name, module in named if isinstance(module, nn.Linear)}
    with BlockwiseGatherer(find_blocks(model)) as gatherer:
        batches = [text([8, 5], 8, seed=seed) for seed in range(3)]
        return named_sums(gatherer.gather(model, modules, batches, starts=modules.values(), progress=False))


def named_sums(statistics: Statistics) -> dict[str, Tensor]:
    records = {**{f"in {k}": v for k, v in statistics.inputs.items()}, **{f"out {k}": v for k, v in statistics.outputs.items()}}
    numbers = {f"{name} rows": torch.tensor(record.rows) for name, record in records.items()}
    tokens = {f"{name} tokens": torch.tensor(record.gradient_tokens) for name, record in statistics.outputs.items()}
    return {**numbers, **tokens, **{f"{name} {key}": t for name, record in records.items() for key, t in record.tensors()}}


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reduced, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any) -> None:
        reduced.append(tensor.data_ptr())
        all_reduce(tensor, *args)

    with patch.object(dist, "all_reduce", counted):
        sums = gather(Routed())
    grams = [tensor.data_ptr() for name, tensor in sums.items() if name.endswith("gram")]
    assert set(grams) <= set(reduced), "in place, without a second copy"
    torch.save(sums, f"{folder}/{rank}")
    torch.save(by_block(), f"{folder}/by block {rank}")
    dist.destroy_process_group()


def test_a_process_without_a_record_takes_part_with_zeros(tmp_path: Path) -> None:
    run_in_processes(run_process, str(tmp_path))
    expected = gather(Routed())
    assert "in experts.0 gram" in expected
    assert "in experts.2 gram" not in expected
    one_by_one = by_block()
    for rank in (0, 1):
        for file, expected_sums in ((str(rank), expected), (f"by block {rank}", one_by_one)):
            got = torch.load(tmp_path / file)
            assert got.keys() == expected_sums.keys()
            for key, tensor in got.items():
                torch.testing.assert_close(tensor, expected_sums[key])
