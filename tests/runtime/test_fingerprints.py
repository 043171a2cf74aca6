"""Fingerprints of batches and models."""

from __future__ import annotations

import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.healing import small
from support.models import llama
from torch import nn
from transformers import BatchEncoding

from reparam_peft.runtime.fingerprints import (
    fingerprint_of_base,
    fingerprint_of_batches,
    fingerprint_of_config,
    fingerprint_of_model,
    fingerprint_of_rows,
)


def test_fingerprints_tell_values_names_dtypes_and_order_apart() -> None:
    def batches(*values: torch.Tensor, name: str = "input_ids") -> list[dict[str, Any]]:
        return [{name: value, "use_cache": False} for value in values]

    one, two = torch.arange(4).reshape(1, 4), torch.ones(1, 4, dtype=torch.long)
    known = [
        batches(one, two),
        batches(two, one),
        batches(one),
        batches(one.int(), two.int()),
        batches(one.reshape(2, 2), two),
        batches(one, two, name="labels"),
    ]
    assert len({fingerprint_of_batches(batch) for batch in known}) == len(known)
    assert fingerprint_of_batches(batches(one.clone(), two.clone())) == fingerprint_of_batches(known[0])
    layers = [nn.Linear(2, 2), nn.Linear(2, 2).half(), nn.Sequential(nn.Linear(2, 2))]
    layers[2][0].load_state_dict(layers[0].state_dict())
    assert len({fingerprint_of_model(layer) for layer in layers}) == 3


def test_fingerprints_tell_what_is_no_tensor_apart() -> None:
    values = [True, False, 1, 1.5, "a", None, np.ones(2), np.zeros(2), np.ones(2, dtype="float32"), [1], object()]
    assert len({fingerprint_of_batches([{"x": value}]) for value in values}) == len(values)
    assert fingerprint_of_batches([{"x": object()}]) == fingerprint_of_batches([{"x": object()}])
    with torch.device("meta"):
        assert fingerprint_of_model(nn.Linear(2, 2)) == fingerprint_of_model(nn.Linear(2, 2))


def test_fingerprints_of_configs_leave_out_where_a_model_is_from() -> None:
    one, two, other = llama(), llama(), llama(rms_norm_eps=1e-3)
    two.config._name_or_path = "elsewhere"
    assert fingerprint_of_config(one) == fingerprint_of_config(two)
    assert len({fingerprint_of_config(model) for model in (one, other, nn.Linear(2, 2), nn.Identity())}) == 4


def test_fingerprints_of_rows_count_and_look_at_them() -> None:
    rows = [{"x": torch.tensor(i)} for i in range(12)]
    table = datasets.Dataset.from_dict({"x": list(range(12))})
    lists = [rows, rows[:-1], [*rows[:5], rows[0], *rows[6:]], []]
    kinds = [*lists, table, table.select(range(11)), range(12), range(11), iter(rows)]
    assert len({fingerprint_of_rows(kind) for kind in kinds}) == len(kinds)
    assert fingerprint_of_rows(rows, most=3) == fingerprint_of_rows([*rows[:5], rows[0], *rows[6:]], most=3)


def test_adapters_count_in_models_and_not_in_what_they_are_made_of() -> None:
    one, two = small(), small(keep=0.3)
    assert fingerprint_of_model(one) != fingerprint_of_model(two)
    assert fingerprint_of_model(one.get_base_model()) != fingerprint_of_model(two.get_base_model())
    assert fingerprint_of_base(one) == fingerprint_of_base(two)
    two.get_base_model().model.norm.weight.data.mul_(2)
    assert fingerprint_of_base(one) != fingerprint_of_base(two)


def test_rows_that_are_transformed_at_random_count_as_they_are_stored() -> None:
    table = datasets.Dataset.from_dict({"x": list(range(12)), "y": list(range(12))})
    changed = table.with_transform(lambda batch: {"x": [random.random() for _ in batch["x"]]})
    kinds = [table, changed, table.with_format("torch"), table.with_format(None, columns=["x"])]
    assert [fingerprint_of_rows(kind) for kind in kinds] == [fingerprint_of_rows(kind) for kind in kinds]
    assert len({fingerprint_of_rows(kind) for kind in [*kinds, changed.select(range(11))]}) == 5


def test_quantized_weights_count_by_the_tensors_within() -> None:
    quantization = pytest.importorskip("torchao").quantization

    def quantized(scale: float) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, bias=False)
        layer.weight.data.mul_(scale)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        return layer

    assert fingerprint_of_model(quantized(1)) == fingerprint_of_model(quantized(1))
    assert fingerprint_of_model(quantized(1)) != fingerprint_of_model(quantized(2)), "only the scales differ"


def test_rows_of_a_tokenizer_count_by_what_they_hold() -> None:
    one, same, other = (BatchEncoding({"input_ids": [first, 2, 3]}) for first in (1, 1, 4))
    assert fingerprint_of_rows([one]) == fingerprint_of_rows([same]) != fingerprint_of_rows([other])
    assert fingerprint_of_batches([{"nested": [one]}]) != fingerprint_of_batches([{"nested": [other]}])
