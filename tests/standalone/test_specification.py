"""What config.json says of layers with numbers in few bits, and files that do not hold what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.few_bits import FEW_BITS
from support.standalone import logits, saved, small
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.standalone.specification import check_specification, module_of, specification_of

PIVOT, DENSE, CORRECTED = (f"model.layers.0.self_attn.{name}_proj" for name in "kvo")  # in 4 bits
GOOD = {"rank": 4, "form": "corrected", "bias": False, "bits": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("few_bits"), FEW_BITS)


def test_what_is_said_of_a_module_makes_the_same_module() -> None:
    for form, bits, correction_bits in (("corrected", 4, 8), ("corrected", 8, None), ("dense", 4, None), ("pivot", 8, None)):
        said = {"rank": 32 if form == "dense" else 17, "form": form, "bias": True, "bits": bits}
        said |= {} if correction_bits is None else {"correction_bits": correction_bits}
        check_specification("up", said)
        module = module_of("up", nn.Linear(32, 40), said)
        assert specification_of(module) == said
        assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    "bad",
    [
        *({**GOOD, "bits": bits} for bits in (16, 3, 4.0, True, None)),
        {key: value for key, value in GOOD.items() if key != "bits"},
        {**GOOD, "correction_bits": 3},
        {**GOOD, "form": "factors", "correction_bits": 8},
        {**GOOD, "form": "qr"},
        {"rank": 4, "form": "dense", "bias": False},
    ],
)
def test_what_no_module_is_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layer 'up' in config\.json must have"):
        check_specification("up", bad)


@pytest.mark.parametrize(
    ("layer", "said", "message"),
    [
        (nn.Linear(32, 40), {**GOOD, "form": "dense"}, r"`rank` in config.json is 4, of a matrix \(40, 32\)"),
        (nn.Conv2d(32, 40, 1), {**GOOD, "form": "pivot"}, "a Conv2d is in few bits, which it cannot be"),
    ],
)
def test_what_a_layer_cannot_be_is_refused(layer: nn.Module, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_of("up", layer, said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{CORRECTED}.Q.weight"), rf"tensor '{CORRECTED}.Q.weight' is missing"),
        (lambda t: t.pop(f"{DENSE}.B.weight_absmax"), rf"tensor '{DENSE}.B.weight_absmax' is missing"),
        (lambda t: t.update({f"{DENSE}.B.weight": t[f"{DENSE}.B.weight"][1:].clone()}), rf"'{DENSE}.B.weight' has shape"),
        (lambda t: t.update({f"{DENSE}.B.weight": t[f"{DENSE}.B.weight"].char()}), rf"'{DENSE}.B.weight' has dtype I8, where"),
        (lambda t: t[f"{PIVOT}.B.weight_absmax"][0].fill_(torch.nan), rf"{PIVOT}.B.weight_absmax: .* NaN"),
        (lambda t: t[f"{PIVOT}.B.weight_absmax"][0].fill_(-1), rf"{PIVOT}: `weight_absmax` holds scales that are negative"),
        (
            lambda t: t.update({f"{CORRECTED}.Q.weight": t[f"{CORRECTED}.Q.weight_absmax"].clone()}),
            rf"'{CORRECTED}.Q.weight' has shape",
        ),
    ],
)
def test_damaged_files_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bits_of_another_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"][DENSE]["bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor '{DENSE}.B.weight_scale' is missing|'{DENSE}.B.weight' has"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_of_its_config_takes_its_state_dict_and_is_cast_with_whole_scales(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    assert logits(made).isfinite().all()
    made.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(made), logits(loaded))
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scales = [buffer.dtype for name, buffer in half.named_buffers() if "weight_absmax" in name or "weight_scale" in name]
    assert len(scales) > 10
    assert {*scales} == {torch.float32}
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half).float() - logits(loaded)).abs().max() < 0.05


def test_files_have_the_size_that_is_told(folder: Path) -> None:
    model = small(FEW_BITS)
    parts = (module for module in model.to_standalone().modules() if isinstance(module, FactorizedModule))
    keys = [tensor for part in parts for name, tensor in part.state_dict().items() if name != "weight"]
    assert sum(t.numel() * t.element_size() for t in keys) == model.size_report().to_dict()["targets"]["stored_bytes"]


def test_code_that_knows_no_few_bits_is_not_given_any(tmp_path: Path) -> None:
    from reparam_peft.standalone.onnx_export import save_onnx

    plain = small(FEW_BITS).to_standalone()
    with pytest.raises(ValueError, match="no ONNX form"):
        save_onnx(plain, tmp_path)
    assert not list(tmp_path.iterdir())
