from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from reparam_peft.compression.parts import Part, narrow, parts
from reparam_peft.compression.weighing import Weighing
from reparam_peft.layers.neuron_groups import NeuronGroup, Producer
from reparam_peft.numerics.storage import Storage

GRAM, FISHER = torch.diag(torch.arange(1.0, 5.0).double()), torch.diag(torch.arange(1.0, 4.0).double())
WHOLE = Weighing(GRAM, FISHER, GRAM, FISHER, 2.0, torch.arange(4.0).double())


def test_a_whole_part_changes_nothing() -> None:
    W = torch.ones(3, 4)
    assert Part().matrix(W, GRAM) is W
    assert Part().of_outputs(W[0]) is not None
    assert Part().expansion(GRAM, None) is None
    whole = Part().weighing(WHOLE)
    assert all(getattr(whole, field.name) is getattr(WHOLE, field.name) for field in fields(Weighing))


def test_rows_are_cut_out_of_outputs_and_columns_out_of_inputs() -> None:
    rows, columns = Part(rows=torch.tensor([0, 2])), Part(columns=torch.tensor([1, 3]))
    assert rows.weighing(WHOLE).fisher.diagonal().tolist() == [1, 3]
    assert rows.weighing(WHOLE).gram is GRAM
    cut = columns.weighing(WHOLE)
    assert cut.gram.diagonal().tolist() == [2, 4]
    assert cut.mean.tolist() == [1, 3]
    assert cut.fisher is FISHER
    assert cut.input is cut.gram
    assert cut.output is cut.fisher
    W = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(rows.matrix(W, GRAM), W[[0, 2]])
    assert rows.of_outputs(W[:, 0]).tolist() == [0, 8]
    torch.testing.assert_close(columns.matrix(W, GRAM), W[:, [1, 3]])  # independent inputs tell nothing of each other
    assert torch.equal(columns.of_outputs(W[:, 0]), W[:, 0])


def test_metrics_other_than_those_of_the_prediction_are_cut_too() -> None:
    other = Weighing(GRAM.diagonal(), None, GRAM, FISHER, 1.0, WHOLE.mean)
    cut = Part(columns=torch.tensor([0, 3])).weighing(other)
    assert cut.input.tolist() == [1, 4]
    assert cut.output is None


@pytest.mark.parametrize("left", [[0, 1], [0, 2], [1, 2]])
def test_expansion_estimates_inputs_that_depend_on_those_that_are_left(left: list[int]) -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 2 * x[:, 0] - x[:, 1]
    part, mean, W = Part(columns=torch.tensor(left)), x.mean(0), torch.arange(6.0).double().view(2, 3)
    torch.testing.assert_close(part.expansion(x.mT @ x, None).of_rows(x[:, left]), x)
    shifted = x + torch.tensor([1.0, 2.0, 30.0]).double()
    about_mean = part.expansion((x - mean).mT @ (x - mean), shifted.mean(0))
    torch.testing.assert_close(about_mean.of_rows(shifted[:, left]), shifted)
    narrow_W, added = about_mean.narrowed(W)
    torch.testing.assert_close(shifted[:, left] @ narrow_W.mT + added, shifted @ W.mT)


def test_parts_of_an_mlp_fit_together() -> None:
    mlp = NeuronGroup((Producer("gate_up", "interleaved"),), "down", 4)
    left = parts(mlp, torch.tensor([1, 2]))
    assert left["gate_up"].rows.tolist() == [2, 3, 4, 5]
    assert left["down"].columns.tolist() == [1, 2]
    storage = narrow(Storage(8, 5, "pivot", bias=True), (4, 5))
    assert storage == Storage(4, 5, "pivot", bias=True, whole=(8, 5))
