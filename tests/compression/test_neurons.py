from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.compressing import TEXT, compressed, config_of, layers, planned
from support.models import bert, gpt2, llama
from torch import nn

from reparam_peft import (
    Anchoring,
    Plan,
    Refinement,
    calibrate,
    plan,
    retruncate,
)

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}
MLPS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "gpt2": {"target_modules": ["mlp.c_fc", "mlp.c_proj"]},
    "bert": {"target_modules": ["intermediate.dense", "output.dense"], "exclude_modules": ["attention.output.dense"]},
}


def dead(model: nn.Module, share: float = 0.45) -> nn.Module:
    """The model with MLPs of which a part of the neurons is read by nobody: their columns of the consumer are zero."""
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if name.endswith(("down_proj", "mlp.c_proj")) or (name.endswith("output.dense") and "attention" not in name):
                neurons = weight if name.endswith("c_proj") else weight.mT  # type: ignore[union-attr]
                neurons[: int(share * len(neurons))] = 0
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """What a model makes of a few tokens."""
    with torch.no_grad():
        output = model(**TEXT[0])
    return output[0] if not hasattr(output, "logits") else output.logits


def lost(model: PeftModel) -> dict[str, list[int]]:
    """Sizes of what is left of the matrices that have lost neurons."""
    return model.peft_config["default"].sizes or {}


@pytest.mark.parametrize("kind", MODELS)
def test_neurons_that_nobody_reads_go_and_the_function_stays(kind: str, tmp_path: Path) -> None:
    model = dead(MODELS[kind]())
    before = logits(model)
    small = compressed(model, TEXT, keep=0.64, **MLPS[kind])
    made = planned(dead(MODELS[kind]()), TEXT, keep=0.64, **MLPS[kind])
    assert len(made.neurons) == 2
    assert all(0.55 <= mlp.kept / mlp.group.neurons <= 0.7 for mlp in made.neurons)
    assert made.ranks == small.peft_config["default"].rank_pattern
    assert small.size_report().keep <= 0.64
    torch.testing.assert_close(logits(small), before, atol=2e-5, rtol=1e-4)
    small.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dead(MODELS[kind]()), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(small))
    torch.testing.assert_close(logits(small.merge_and_unload()), before, atol=2e-5, rtol=1e-4)


def test_the_hidden_layer_is_computed_with_what_is_left() -> None:
    small = compressed(llama(), TEXT, keep=0.4)
    widths: dict[str, int] = {}
    for name, layer in layers(small).items():
        if name.endswith("down_proj"):
            layer.register_forward_pre_hook(lambda module, args, name=name: widths.update({name: args[0].shape[-1]}))
    logits(small)
    assert widths
    assert widths == {name: size[1] for name, size in lost(small).items() if name.endswith("down_proj")}


def test_the_prediction_is_better_with_neurons_than_without() -> None:
    with_neurons, without = (planned(llama(), TEXT, keep=0.5, neurons=neurons) for neurons in (None, False))
    assert with_neurons.neurons
    assert not without.neurons
    assert with_neurons.predicted_loss < without.predicted_loss
    for made in (with_neurons, without):
        assert made.stored_parameters <= 0.5 * made.dense_parameters
    assert "neurons of 2 MLPs" in str(with_neurons)
    assert " of 160 x 64" in str(with_neurons)


def test_a_plan_is_read_again_and_followed(tmp_path: Path) -> None:
    made = planned(llama(), TEXT)
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    own, given = compressed(llama(), TEXT), compressed(llama(), TEXT, arguments={"plan": again})
    assert torch.equal(logits(own), logits(given))
    assert lost(own) == lost(given)


def change_kept(fields: dict[str, Any]) -> None:
    fields["neurons"][0]["kept"] += 1


def change_size(fields: dict[str, Any]) -> None:
    next(module for module in fields["modules"] if module["size"])["size"][0] += 8


def drop_size(fields: dict[str, Any]) -> None:
    next(module for module in fields["modules"] if module["size"])["size"] = None


def change_producer(fields: dict[str, Any]) -> None:
    fields["neurons"][0]["group"]["producers"][0][0] = "model.layers.0.self_attn.q_proj"


def drop_neurons(fields: dict[str, Any]) -> None:
    fields["neurons"] = []


def change_layout(fields: dict[str, Any]) -> None:
    fields["neurons"][0]["group"]["producers"][0][1] = "columns"


@pytest.mark.parametrize("change", [change_kept, change_size, drop_size, change_producer, drop_neurons, change_layout])
def test_a_plan_whose_neurons_do_not_fit_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    made = json.loads(json.dumps(planned(llama(), TEXT).to_dict()))
    change(made)
    (tmp_path / "plan.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"neurons|size|producers"):
        compressed(llama(), TEXT, arguments={"plan": Plan.load(tmp_path / "plan.json")})


def test_a_plan_of_an_mlp_that_the_model_does_not_have_is_refused() -> None:
    made = planned(llama(), TEXT)
    mlp = made.neurons[0]
    other = replace(mlp, group=replace(mlp.group, producers=mlp.group.producers[:1]))
    with pytest.raises(ValueError, match=r"make (one|a plan)"):
        compressed(llama(), TEXT, arguments={"plan": replace(made, neurons=(other, *made.neurons[1:]))})


@pytest.mark.parametrize(
    "options",
    [{"allocation": "uniform"}, {"r": 8}, {"form": "factors", "ceiling": 0.9}, {"method": "svd", "allocation": "uniform"}],
)
def test_neurons_that_cannot_go_are_refused_where_asked_for_and_else_stay(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`neurons=True`"):
        compressed(llama(), TEXT, neurons=True, **options)
    assert not lost(compressed(llama(), TEXT, **options))


def test_a_model_without_mlps_says_so_where_neurons_are_asked_for() -> None:
    with pytest.raises(ValueError, match="no MLP of the model can lose neurons"):
        compressed(llama(), TEXT, neurons=True, target_modules=["q_proj", "k_proj"])


def test_a_rank_that_is_given_keeps_the_neurons_of_its_mlp() -> None:
    small = compressed(llama(), TEXT, rank_pattern={"layers.0.mlp.up_proj": 20})
    assert lost(small)
    assert not any(name.startswith("model.layers.0.") for name in lost(small))


@pytest.mark.parametrize("way", ["statistics", "generator", "in parts"])
def test_every_way_to_give_data_leads_to_the_same_neurons(way: str) -> None:
    expected = compressed(llama(), TEXT)
    arguments: dict[str, Any] = {}
    data: Any = TEXT
    if way == "statistics":
        data = calibrate(llama(), config_of(), TEXT, progress=False)
    elif way == "generator":
        data = (batch for batch in TEXT)
    else:
        arguments["max_memory"] = 8 * (2 * 64**2 * 2 + 2 * 160**2 + 2 * 160**2 + 64**2)
    small = compressed(llama(), data, arguments=arguments)
    assert lost(small) == lost(expected)
    torch.testing.assert_close(logits(small), logits(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sequential", [True, Anchoring(original=0.0, residual=0.0), Anchoring(original=1.0)])
def test_block_by_block_neurons_are_chosen_in_the_compressed_part(kind: str, sequential: Any) -> None:
    model = dead(MODELS[kind]())
    before = logits(model)
    small = compressed(model, TEXT, keep=0.64, arguments={"sequential": sequential}, **MLPS[kind])
    assert lost(small)
    assert small.size_report().keep <= 0.64
    torch.testing.assert_close(logits(small), before, atol=1e-4, rtol=1e-3)


def test_refined_blocks_train_what_is_left_and_a_run_goes_on(tmp_path: Path) -> None:
    arguments = {"refine": Refinement(epochs=1, batch_size=2), "run_folder": tmp_path / "run"}
    small = compressed(llama(), TEXT, arguments=arguments)
    again = compressed(llama(), TEXT, arguments=arguments)
    assert lost(small)
    assert torch.equal(logits(small), logits(again))


@pytest.mark.parametrize("data", [True, False])
def test_retruncated_matrices_keep_their_neurons(data: bool) -> None:
    small = compressed(llama(), TEXT, keep=0.6)
    sizes = lost(small)
    lower = retruncate(small, 0.4, TEXT if data else None, progress=False)
    assert lost(lower) == sizes
    assert lower.size_report().keep <= 0.4
    assert torch.isfinite(logits(lower)).all()


def test_config_and_plan_without_neurons_are_as_they_were() -> None:
    made = plan(llama(), config_of(neurons=False), TEXT, progress=False)
    assert all(module.size is None for module in made.modules)
    assert not made.neurons
    assert not lost(compressed(llama(), TEXT, neurons=False))
