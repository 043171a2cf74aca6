from __future__ import annotations

import pytest
from support.batches import text
from support.models import llama
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.compression.choices import with_defaults
from reparam_peft.compression.mlps import check_alike, find_mlps, may_lose_neurons
from reparam_peft.tuner.selection import select_targets

BATCHES = [text([12, 9], 12)]
CONFIG = with_defaults(ReparamConfig(target_modules="all-linear"))


def found(model: nn.Module, batches: object = BATCHES, **options: object) -> list[str]:
    """Consumers of the MLPs that are found."""
    config = with_defaults(ReparamConfig(target_modules="all-linear"))
    mlps, _ = find_mlps(model, config, select_targets(model, config, "default"), batches, None, **options)  # type: ignore[arg-type]
    check_alike(mlps)
    return [mlp.consumer for mlp in mlps]


def test_the_first_batch_tells_and_none_is_lost() -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert found(llama()) == found(llama(), iter(BATCHES)) == names
    _, batches = find_mlps(llama(), CONFIG, select_targets(llama(), CONFIG, "default"), iter(BATCHES), None)
    assert list(batches) == BATCHES


def test_an_mlp_within_one_block_or_outside_of_all_is_found() -> None:
    assert found(llama(), blocks=["model.layers.0", "model.layers.1"]) == found(llama(), blocks=["lm_head"]) == found(llama())


def test_a_batch_that_the_model_refuses_is_left_to_calibration() -> None:
    assert found(llama(), [{"nonsense": BATCHES[0]["input_ids"]}]) == []


@pytest.mark.parametrize(("neurons", "expected"), [(None, True), (True, True), (False, False)])
def test_whether_neurons_may_go(neurons: bool | None, expected: bool) -> None:
    assert may_lose_neurons(with_defaults(ReparamConfig(target_modules="all-linear", neurons=neurons))) is expected
