"""All sizes of one model by one method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.models import gpt2, llama
from torch import nn

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.evaluation.measures import Measure
from reparam_peft.searching.family import Family

BATCHES = [{"input_ids": torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
CONFIG = ReparamConfig(target_modules="all-linear", method="whitened")


def test_a_family_truncates_to_any_rank() -> None:
    model = llama()
    statistics = calibrate(model, CONFIG, BATCHES, progress=False)
    family = Family(model, CONFIG, statistics, 0)
    ids = BATCHES[0]["input_ids"]
    before = model(ids).logits
    with family.truncated(family.plan(0.99)), torch.no_grad():
        close = model(ids).logits
    with family.truncated(family.plan(0.3)), torch.no_grad():
        far = model(ids).logits
    assert (close - before).norm() < (far - before).norm()
    assert torch.equal(model(ids).logits, before)


def test_a_size_that_cannot_be_met_is_no_trial() -> None:
    model = llama()
    family = Family(model, CONFIG, calibrate(model, CONFIG, BATCHES, progress=False), 0)
    measure = Measure("norm", lambda model: float(model(BATCHES[0]["input_ids"]).logits.norm()), False)
    assert family.trial(0.001, measure, 1.0) is None
    trial = family.trial(0.5, measure, 1e9)
    assert (trial.method, trial.keep, trial.within) == ("whitened", 0.5, True)
    assert trial.stored_parameters <= 0.5 * family.dense_parameters


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_trial_computes_what_the_compressed_model_does_also_without_some_neurons(make: Callable[[], nn.Module]) -> None:
    model, ids = make(), BATCHES[0]["input_ids"]
    statistics = calibrate(model, CONFIG, BATCHES, progress=False)
    family = Family(model, CONFIG, statistics, 0)
    plan = family.plan(0.5)
    assert plan.neurons
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with family.truncated(plan), torch.no_grad():
        tried = model(ids).logits
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    small = compress(make(), dataclasses.replace(CONFIG, keep=0.5), statistics, progress=False)
    torch.testing.assert_close(tried, small(ids).logits, atol=1e-4, rtol=1e-4)
