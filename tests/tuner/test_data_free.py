"""Factors without data: the truncated SVD, what needs data instead, and a model as it was where one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import compress
from support.model_state import assert_untouched
from support.models import llama, token_inputs
from support.tolerances import assert_close
from torch import nn

import reparam_peft.numerics.methods
from reparam_peft import ReparamConfig, factorize
from reparam_peft.config.fields import ALLOCATIONS
from reparam_peft.numerics.methods import METHODS
from reparam_peft.numerics.storage import FORMS

# What `get_peft_model`, which gets no data, refuses; all of them are valid in a config.
NEEDS_DATA: list[tuple[str, Any, str]] = [
    ("method", "whitened", "`method='whitened'` needs calibration data"),
    ("method", "autoencoder", "`method='autoencoder'` needs calibration data"),
    ("allocation", "loss", "`allocation='loss'` needs calibration data"),
    ("input_metric", "none", "`input_metric` has an effect with calibration data only"),
    ("output_metric", "diagonal", "`output_metric` has an effect with calibration data only"),
    ("shrinkage", 0.0, "`shrinkage` has an effect with calibration data only"),
    ("output_shrinkage", 0.5, "`output_shrinkage` has an effect with calibration data only"),
    ("rank_multiple", 8, "`rank_multiple` has an effect with calibration data only"),
    ("floor", 0.0, "`floor` has an effect with calibration data only"),
    ("ceiling", 1.0, "`ceiling` has an effect with calibration data only"),
]


@pytest.mark.parametrize(("name", "value", "message"), NEEDS_DATA)
def test_what_needs_data_is_refused_where_there_is_none(name: str, value: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = ReparamConfig(target_modules=["0"], **{name: value})
    with pytest.raises(ValueError, match=f"{message}.*`reparam_peft.compress"):
        get_peft_model(model, config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_every_choice_that_a_config_takes_is_data_free_or_refused_above() -> None:
    refused = {(name, value) for name, value, _ in NEEDS_DATA}
    for name, values in (("method", METHODS), ("allocation", ALLOCATIONS), ("form", FORMS)):
        for value in values:
            model = nn.Sequential(nn.Linear(8, 8))
            if (name, value) not in refused:
                rank = {"r": 2} if value == "corrected" else {}
                get_peft_model(model, ReparamConfig(target_modules=["0"], **{name: value}, **rank))


def test_a_matrix_may_stay_dense_beside_corrected_ones(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=["q_proj"], form="corrected", r=2, dense_modules=["model.layers.1.self_attn.q_proj"])
    small = get_peft_model(llama(), config)
    assert [matrix.rank for matrix in small.size_report().matrices] == [2, None]
    small.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(**token_inputs()).logits, small(**token_inputs()).logits)


def test_factors_are_the_truncated_svd() -> None:
    original, small = llama(), compress(llama(), target_modules=["q_proj"], r=9)
    for index in range(2):
        W = original.model.layers[index].self_attn.q_proj.weight.detach()
        A, B = small.model.model.layers[index].self_attn.q_proj.reparam_factors["default"].factors
        assert_close(A @ B, torch.Tensor(factorize(W, 9).A @ factorize(W, 9).B))


def spoil(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_the_last_weight_leaves_the_model_as_it_was(value: float) -> None:
    model = spoil(llama(), value)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: `weight` contains NaN or infinite values"):
        compress(model, target_modules="all-linear")
    assert_untouched(model, spoil(llama(), value))
    assert not hasattr(model, "peft_config")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 0.0
    assert compress(model, target_modules="all-linear").size_report().keep < 0.8


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_failure_midway_leaves_the_model_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 9:
            raise error("did not converge")
        return factorize(*arguments)

    monkeypatch.setattr(reparam_peft.numerics.decompositions, "factorize", fails)
    model = llama()
    with pytest.raises(error):
        compress(model, target_modules="all-linear")
    assert_untouched(model, llama())


def test_failure_while_adding_an_adapter_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    small = compress(llama(), target_modules="all-linear", keep=0.5, keep_base=True).eval()
    expected, state = small(**token_inputs()).logits, list(small.state_dict())

    def fails(*arguments: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(reparam_peft.numerics.decompositions, "factorize", fails)
    with pytest.raises(torch.linalg.LinAlgError, match=r"q_proj: did not converge"):
        small.add_adapter("other", ReparamConfig(target_modules="all-linear", keep=0.2, keep_base=True))
    assert list(small.peft_config) == ["default"]
    assert list(small.state_dict()) == state
    assert torch.equal(small(**token_inputs()).logits, expected)
