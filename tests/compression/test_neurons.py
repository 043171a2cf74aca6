from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from reparam_peft.arguments import ReparamWarning

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
        arguments["max_memory"] = 4 * (2 * 64 * 65 * 2 + 2 * 160 * 161 + 2 * 160 * 161 + 64 * 65)
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


def test_neurons_can_be_asked_for_in_every_step() -> None:
    statistics = calibrate(llama(), config_of(neurons=True), TEXT, progress=False)
    assert lost(compressed(llama(), statistics, neurons=True))
    assert lost(compressed(llama(), TEXT, neurons=True))


class Stream:
    """Batches that can be read once, though each reader gets an iterator of its own."""

    def __init__(self) -> None:
        self.left = iter(TEXT)

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in self.left)


def test_no_batch_of_a_stream_is_lost() -> None:
    assert planned(llama(), Stream()).calibration_tokens == planned(llama(), TEXT).calibration_tokens


@pytest.mark.parametrize(("keep", "floor"), [(0.6, 0.55), (0.7, 0.65), (0.5, 0.45)])
def test_no_matrix_is_stored_below_the_floor(keep: float, floor: float) -> None:
    for module in planned(llama(), TEXT, keep=keep, floor=floor).modules:
        assert module.stored_parameters >= floor * module.dense_parameters


class Across(nn.Module):
    """Two blocks, of which the first makes neurons that the second reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        up, down = nn.Sequential(nn.Linear(32, 96), nn.ReLU()), nn.Sequential(nn.Linear(96, 32), nn.Tanh())
        self.blocks = nn.ModuleList([up, down])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


ROWS = [{"x": torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(i))} for i in range(3)]
BOTH = ["blocks.0.0", "blocks.1.0"]


def test_statistics_of_a_model_that_has_no_example_warn_that_neurons_stay() -> None:
    made = planned(Across(), ROWS, target_modules=BOTH)
    assert made.neurons
    statistics = calibrate(Across(), config_of(target_modules=BOTH), ROWS, progress=False)
    with pytest.warns(ReparamWarning, match="give batches in place of statistics"):
        assert not planned(Across(), statistics, target_modules=BOTH).neurons
    with pytest.raises(ValueError, match="give batches in place of statistics"):
        compressed(Across(), statistics, target_modules=BOTH, arguments={"plan": made})


def test_an_mlp_across_two_blocks_keeps_its_neurons_block_by_block() -> None:
    arguments = {"refine": Refinement(epochs=1)}
    assert not lost(compressed(Across(), ROWS, target_modules=BOTH, arguments=arguments))
    made = planned(Across(), ROWS, target_modules=BOTH)
    with pytest.raises(ValueError, match="make a plan for this model"):
        compressed(Across(), ROWS, target_modules=BOTH, arguments={**arguments, "plan": made})


def fewer_than_offered() -> dict[str, Any]:
    """A plan that leaves a quarter of the neurons of one MLP."""
    fields: dict[str, Any] = json.loads(json.dumps(planned(llama(), TEXT).to_dict()))
    mlp = fields["neurons"][0]
    mlp["kept"] = 40
    names = [mlp["group"]["consumer"], *(name for name, _ in mlp["group"]["producers"])]
    for module in fields["modules"]:
        if module["name"] in names:
            module["size"] = [64, 40] if module["name"].endswith("down_proj") else [40, 64]
            module["rank"] = 40
    return fields


def test_a_plan_may_leave_fewer_neurons_than_are_offered() -> None:
    small = compressed(llama(), TEXT, arguments={"plan": Plan.from_dict(fewer_than_offered())})
    assert [40, 64] in lost(small).values()
    assert torch.isfinite(logits(small)).all()


@pytest.mark.parametrize("rank", [None, 63])
def test_the_rank_of_what_is_left_must_fit_its_size(rank: int | None) -> None:
    fields = fewer_than_offered()
    next(module for module in fields["modules"] if module["size"] == [64, 40])["rank"] = rank
    with pytest.raises(ValueError, match=r"`rank` must be in \[1, 40\]"):
        Plan.from_dict(fields)


@pytest.mark.parametrize("neurons", [True, False])
def test_a_config_that_contradicts_its_plan_is_refused(neurons: bool) -> None:
    made = planned(llama(), TEXT, neurons=not neurons)
    with pytest.raises(ValueError, match=r"`plan` has MLPs (lose|keep) neurons"):
        compressed(llama(), TEXT, neurons=neurons, arguments={"plan": made})


def mean_output(net: nn.Module) -> torch.Tensor:
    """The mean of what the first MLP of a GPT-2 gives for the tokens of TEXT that are no padding."""
    outputs: list[torch.Tensor] = []
    mlp = next(module for name, module in net.named_modules() if name.endswith("h.0.mlp.c_proj"))
    handle = mlp.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with torch.no_grad():
        for batch in TEXT:
            net(**batch)
    handle.remove()
    return torch.cat([rows[batch["attention_mask"].bool()] for rows, batch in zip(outputs, TEXT, strict=True)]).mean(0)


@pytest.mark.parametrize("original", [0.0, 0.5, 1.0])
def test_block_by_block_the_mean_of_what_reads_neurons_is_preserved(original: float) -> None:
    targets = {"target_modules": ["h.0.mlp.c_fc", "h.0.mlp.c_proj"], "keep": 0.7, "rank_multiple": None}
    sequential = Anchoring(original=original, residual=0.0)
    small = compressed(gpt2(), TEXT, arguments={"sequential": sequential}, **targets)
    assert lost(small)
    expected = mean_output(gpt2())
    assert (mean_output(small) - expected).norm() < 0.02 * expected.norm()
