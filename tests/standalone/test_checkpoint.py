"""Damaged and hostile standalone checkpoints: refused, with the file and the tensor, and nothing half loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.models import llama
from support.standalone import NARROW, logits, saved, small
from torch import Tensor
from transformers import AutoModelForCausalLM

from reparam_peft import ReparamConfig
from reparam_peft.standalone.checkpoint import CheckpointConfig

LAYER = "model.layers.1.mlp.up_proj"
GOOD = {"rank": 4, "form": "factors", "bias": False}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.A.K.weight"), rf"model\.safetensors: tensor '{LAYER}.A.K.weight' is missing"),
        (lambda t: t.pop("model.norm.weight"), r"model\.safetensors: tensor 'model.norm.weight' is missing"),
        (lambda t: t.pop(f"{LAYER}.weight"), rf"tensor '{LAYER}.weight' is missing"),
        (lambda t: t.update({f"{LAYER}.B.bias": torch.zeros(1)}), rf"model\.safetensors: tensor '{LAYER}.B.bias' does not"),
        (lambda t: t.update({f"{LAYER}.B.weight": torch.zeros(2, 64)}), rf"tensor '{LAYER}.B.weight' has shape \[2, 64\], not"),
        (lambda t: t[f"{LAYER}.B.weight"][0, 0].fill_(torch.nan), rf"{LAYER}.B.weight: .* NaN"),
        (lambda t: t[f"{LAYER}.A.K.weight"][0, 0].fill_(torch.inf), rf"{LAYER}.A.K.weight: .* NaN or infinite"),
        (lambda t: t.update({f"{LAYER}.B.weight": t[f"{LAYER}.B.weight"].int()}), f"{LAYER}.B.weight' has dtype I32, where"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}), "tensor 'lm_head.weight' has dtype I32, where"),
        (lambda t: t.update({f"{LAYER}.A.mask": t[f"{LAYER}.A.mask"].int()}), f"{LAYER}.A.mask' has dtype I32, where"),
        (lambda t: t[f"{LAYER}.A.mask"].zero_(), rf"{LAYER}: the mask of the pivot form has 0 bits set"),
    ],
)
def test_changed_tensors(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    change_tensors(saved(tmp_path, "pivot"), change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_numbers_beside_the_factors_that_are_not_finite_are_told(name: str, value: float, tmp_path: Path) -> None:
    change_tensors(saved(tmp_path), lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.warns(UserWarning, match=rf"{tmp_path}: tensors .* NaN or infinite values, .*: {name}\. Unless the base"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 3000, -1])
def test_truncated_files(length: int, tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Exception, match=r"safetensors|[Hh]eader|incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=3), r"`format_version` of the checkpoint is 3, .* reads 1 and 2\. Upgrade"),
        (lambda c: c.update(format_version="1"), r"`format_version` of the checkpoint is '1'"),
        (lambda c: c.update(run="os.system"), r"unknown fields \['run'\]"),
        (lambda c: c.update(layers=[1]), r"`layers` in config\.json"),
        (lambda c: c.update(layers={}), r"`layers` in config\.json"),
        (lambda c: c["layers"].update({"": GOOD}), "layer '' in config.json"),
        (lambda c: c["layers"].update({"model.layers.9.mlp.up_proj": GOOD}), "model.layers.9.mlp.up_proj: .* there is none"),
        (lambda c: c["layers"].update({"model.norm": GOOD}), "model.norm: .* cannot be factorised"),
        (lambda c: c["layers"].update({"model.__class__": GOOD}), "model.__class__: .* there is none"),
        (lambda c: c["layers"][LAYER].update(rank=10**9), f"{LAYER}: `rank` in config.json is 1000000000, of a matrix"),
        (lambda c: c["layers"][LAYER].update(rank=5), rf"tensor '{LAYER}.* has shape"),
        (lambda c: c["layers"][LAYER].update(rank=0), f"layer '{LAYER}' in config.json must have a `rank` of at least 1"),
        (lambda c: c["layers"][LAYER].update(rank=True), f"layer '{LAYER}' in config.json"),
        (lambda c: c["layers"][LAYER].update(form="exec"), f"layer '{LAYER}' in config.json"),
        (lambda c: c["layers"][LAYER].update(form="pivot"), f"tensor '{LAYER}.A.mask' is missing"),
        (lambda c: c["layers"][LAYER].update(bias=True), f"tensor '{LAYER}.bias' is missing"),
        (lambda c: c["layers"][LAYER].pop("bias"), f"layer '{LAYER}' in config.json"),
        (lambda c: c["layers"].pop(LAYER), f"the layer of '{LAYER}.weight' is factorised, but not among"),
    ],
)
def test_changed_config(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    change_config(saved(tmp_path), change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.kept_rows"), rf"tensor '{LAYER}.kept_rows' is missing"),
        (lambda t: t[f"{LAYER}.kept_rows"].zero_(), rf"{LAYER}: the mask `kept_rows` has 0 bits set, and 96 of 160 are left"),
        (
            lambda t: t.update({f"{LAYER}.kept_rows": torch.zeros(19)}),
            rf"tensor '{LAYER}.kept_rows' has shape \[19\], not \[20\]",
        ),
        (lambda t: t.update({f"{LAYER}.A.weight": torch.zeros(2)}), rf"tensor '{LAYER}.A.weight' does not belong"),
        (lambda t: t[f"{LAYER}.B.weight"][0, 0].fill_(torch.nan), rf"{LAYER}.B.weight: .* NaN"),
    ],
)
def test_changed_tensors_of_layers_with_fewer_neurons(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    change_tensors(saved(tmp_path, NARROW), change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": 161, "rank": 64}, r"the size that is left of a matrix \(160, 64\) must be .* smaller, got \(161, 64\)"),
        ({"out": 160}, r"the size that is left of a matrix \(160, 64\) must be .* smaller, got \(160, 64\)"),
        ({"out": 10**9, "in": 10**9, "rank": 3, "form": "pivot"}, "the size that is left of a matrix"),
        ({"out": 95}, r"has shape \[96, 64\], not \[95, 64\]"),
        ({"out": 0}, "layer '.*' in config.json must have"),
        ({"out": True}, "layer '.*' in config.json must have"),
        ({"in": None}, "layer '.*' in config.json must have"),
        ({"rank": 65}, "layer '.*' in config.json must have"),
        ({"form": "pivot"}, "layer '.*' in config.json must have"),
        ({"rank": 63}, "layer '.*' in config.json must have"),
    ],
    ids=str,
)
def test_changed_config_of_layers_with_fewer_neurons(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    change_config(saved(tmp_path, NARROW), lambda config: config["layers"][LAYER].update(change))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_matrix_is_stored_as_it_is_only_where_neurons_are_left_out() -> None:
    with pytest.raises(ValueError, match=r"layer 'a' in config\.json must have"):
        CheckpointConfig({"a": {**GOOD, "form": "dense"}})
    with pytest.raises(ValueError, match=r"`layers` in config\.json must name the factorised layers, got None"):
        CheckpointConfig()


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    small().to_standalone().save_pretrained(tmp_path, max_shard_size="50KB")
    [*tmp_path.glob("model-*.safetensors")][1].unlink()
    with pytest.raises(ValueError, match=r"model-0000\d-of-0000\d\.safetensors is not a whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_survives_json() -> None:
    config = CheckpointConfig({"a.b": GOOD, "c": {**GOOD, "out": 5, "in": 8}})
    assert CheckpointConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


@pytest.mark.parametrize("form", ["factors", "pivot", NARROW])
@pytest.mark.parametrize("buffers", [False, True])
def test_layers_on_disk_compute_the_same(form: str, buffers: bool, tmp_path: Path) -> None:
    path = str(saved(tmp_path / "model", form))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map = {**places, "lm_head": "cpu", "model.rotary_emb": "cpu"}
    expected = logits(AutoModelForCausalLM.from_pretrained(path))
    options: dict[str, Any] = {"device_map": device_map, "offload_folder": str(tmp_path / "off"), "offload_buffers": buffers}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path, **options)), expected)


def test_empty_factors_of_a_sharded_model_are_not_saved(tmp_path: Path) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], r=8)).to_standalone()
    B = model.model.layers[1].self_attn.q_proj.B
    B.weight.data = B.weight.new_empty(0)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.B\.weight: the tensor is empty"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
