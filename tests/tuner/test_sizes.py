"""Sizes of one matrix, of a report and of a model: parameters and bytes before and after."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from support.adapters import compress
from support.models import bert, gpt2, llama
from torch import nn

from reparam_peft import MatrixSize, ReparamConfig, SizeReport


def report() -> SizeReport:
    matrices = [MatrixSize("a", (10, 20), 2, 60, 4), MatrixSize("b", (5, 4), None, 20, 2), MatrixSize("c", (8, 8), 1, 16, 4)]
    return SizeReport(matrices, other_parameters=1000, other_bytes=3000)


def test_size_of_one_matrix() -> None:
    factorised, dense, _ = report().matrices
    assert (factorised.dense_parameters, factorised.dense_bytes, factorised.stored_bytes) == (200, 800, 240)
    assert (dense.dense_parameters, dense.dense_bytes, dense.stored_bytes) == (20, 40, 40)


def test_size_report_adds_up() -> None:
    targets = {"dense_parameters": 284, "stored_parameters": 96, "dense_bytes": 1096, "stored_bytes": 344}
    model = {"dense_parameters": 1284, "stored_parameters": 1096, "dense_bytes": 4096, "stored_bytes": 3344}
    assert report().to_dict() == {"targets": targets, "model": model}
    assert report().keep == 96 / 284
    assert report().dense_modules == ["b"]


def test_size_report_of_a_model_counts_what_is_stored() -> None:
    model = llama().bfloat16()
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    peft_model = get_peft_model(model, ReparamConfig(target_modules="all-linear", r=4))
    sizes = peft_model.size_report().to_dict()
    stored = sum(p.numel() for name, p in peft_model.named_parameters() if "reparam_factors" in name)
    assert sizes["targets"] == {
        "dense_parameters": linear,
        "stored_parameters": stored,
        "dense_bytes": 2 * linear,
        "stored_bytes": 2 * stored,
    }
    assert sizes["model"]["dense_parameters"] == total
    assert sizes["model"]["dense_bytes"] == 2 * total
    assert sizes["model"]["stored_parameters"] == sum(p.numel() for p in peft_model.parameters())


def test_size_report_prints_before_after_and_what_stays_dense() -> None:
    lines = [" ".join(line.split()) for line in str(report()).splitlines()]
    assert lines == [
        "before after kept",
        "targets parameters 284 96 33.8%",
        "targets bytes 1,096 344 31.4%",
        "model parameters 1,284 1,096 85.4%",
        "model bytes 4,096 3,344 81.6%",
        "2 matrices factorised, 1 left dense",
        "dense: b",
    ]


def test_size_report_without_targets() -> None:
    empty = SizeReport([], other_parameters=0, other_bytes=0)
    assert empty.keep == 1.0
    assert "0 matrices factorised, 0 left dense" in str(empty)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_stored_parameters_stay_within_keep(keep: float) -> None:
    report = compress(llama(), target_modules="all-linear", keep=keep).size_report()
    assert 0.5 * keep < report.keep <= keep


def test_size_report_counts_a_kept_base_and_tied_weights_once() -> None:
    for build in (llama, gpt2, bert):
        total = sum(parameter.numel() for parameter in build().parameters())
        for keep_base in (False, True):
            report = compress(build(), keep=0.5, keep_base=keep_base).size_report()
            assert isinstance(report, SizeReport)
            assert report.to_dict()["model"]["dense_parameters"] == total
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default'\], got 'other'"):
        compress(llama()).size_report("other")


def test_size_report_counts_modules_to_save_once() -> None:
    total = sum(parameter.numel() for parameter in bert().parameters())
    report = compress(bert(), target_modules=["query"], r=4, task_type="SEQ_CLS").size_report()
    assert report.to_dict()["model"]["dense_parameters"] == total
