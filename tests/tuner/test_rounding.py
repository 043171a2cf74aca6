"""Factors in few bits, rounded with calibration: what standalone models compute, store and refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.models import bert, gpt2, llama, token_inputs
from support.narrow import narrowed
from support.standalone import NARROW
from transformers import PreTrainedModel

from reparam_peft import ReparamConfig, Statistics, calibrate, compress
from reparam_peft.layers.schemes import SCHEMES

TEXT = [{"input_ids": torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))}]

LARGEST = {"int8": 1.2, "int4": 0.8}  # error of outputs, over that of the nearest numbers; 8 bits leave little to gain


def small_and_statistics(make: Callable[[], PreTrainedModel], form: str, **options: object) -> tuple[PeftModel, Statistics]:
    config = ReparamConfig(target_modules="all-linear", keep=0.6, form="pivot" if form == NARROW else form, **options)
    statistics = calibrate(make(), config, TEXT)
    return (narrowed(make()) if form == NARROW else compress(make(), config, statistics)).eval(), statistics


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**TEXT[0]).logits


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize(("make", "form"), [(llama, "factors"), (gpt2, "pivot"), (bert, "factors"), (bert, NARROW)])
def test_outputs_stay_nearer_and_files_hold_them(
    make: Callable[[], PreTrainedModel], form: str, scheme: str, tmp_path: Path
) -> None:
    model, statistics = small_and_statistics(make, form)
    before = logits(model)
    nearest = logits(model.to_standalone(quantize=scheme))
    quantised = model.to_standalone(quantize=scheme, statistics=statistics)
    got = logits(quantised)
    assert 0 < (got - before).norm() < LARGEST[scheme] * (nearest - before).norm()
    assert torch.equal(logits(model), before), "the PEFT model stays as it is"
    quantised.save_pretrained(tmp_path)
    assert torch.equal(logits(type(quantised).from_pretrained(tmp_path)), got)


def test_short_rows_are_fitted_and_biases_moved() -> None:
    layer = "bert.encoder.layer.0.attention.self.query"
    model, statistics = small_and_statistics(bert, "factors", rank_pattern={"query": 8})
    module = model.to_standalone(quantize="int4", statistics=statistics).get_submodule(layer)
    assert module.A.weight.dtype == torch.float32
    assert module.B.weight.dtype == torch.uint8
    mean = statistics.mean(layer).float()[None]
    with torch.no_grad():
        torch.testing.assert_close(module(mean), model.get_submodule("base_model.model." + layer)(mean), rtol=1e-4, atol=1e-5)


def test_a_module_that_no_batch_reached_is_rounded_to_nearest() -> None:
    model, statistics = small_and_statistics(llama, "factors")
    layer = "model.layers.1.mlp.down_proj"
    statistics.inputs.pop(statistics.reads.pop(layer))
    quantised = model.to_standalone(quantize="int4", statistics=statistics)
    nearest = model.to_standalone(quantize="int4")
    assert torch.equal(quantised.get_submodule(layer).B.weight, nearest.get_submodule(layer).B.weight)


@pytest.mark.parametrize(
    ("statistics", "quantize", "message"),
    [
        (Statistics(), "int4", "`statistics` do not hold this module"),
        (Statistics(), None, "`statistics` have an effect with `quantize` only"),
        (None, "int4", "`statistics` are of 48 inputs, and it has 64; they are of another model"),
    ],
    ids=["of other modules", "not quantised", "of another size"],
)
def test_what_is_refused(statistics: Statistics | None, quantize: str | None, message: str) -> None:
    model, own = small_and_statistics(llama, "factors")
    if statistics is None:
        _, statistics = small_and_statistics(bert, "factors")
        own.inputs[own.reads["model.layers.0.self_attn.q_proj"]] = next(iter(statistics.inputs.values()))
        statistics = own
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.to_standalone(quantize=quantize, statistics=statistics)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model(**token_inputs()).logits.isfinite().all()
