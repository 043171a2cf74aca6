"""Factors in 8 and 4 bits: in standalone models, in their checkpoints, and out of them again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import bert, gpt2, llama, t5, token_inputs
from support.narrow import narrowed
from support.standalone import NARROW
from support.tolerances import relative_error
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from reparam_peft import ReparamConfig
from reparam_peft.layers.schemes import SCHEMES
from reparam_peft.numerics.storage import LEAST_INPUTS

LAYER = "model.layers.0.self_attn.q_proj"
LARGEST_ERROR = {"int8": 0.05, "int4": 0.6}  # of logits, relative; weights are random, so that errors do not average out


def small(make: Callable[[], PreTrainedModel] = llama, form: str = "factors", **options: object) -> PeftModel:
    if form == NARROW:
        return narrowed(make(), **options)
    config = ReparamConfig(**{"target_modules": "all-linear", "keep": 0.6, "form": form, **options})
    return get_peft_model(make(), config).eval()


def logits(model: torch.nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or token_inputs())).logits


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize(("make", "form"), [*product([llama, gpt2, bert, t5], ["factors", "pivot"]), (bert, NARROW)])
def test_quantised_factors_compute_nearly_the_same_and_are_stored(
    make: Callable[[], PreTrainedModel], form: str, scheme: str, tmp_path: Path
) -> None:
    batch = token_inputs()
    if make is t5:
        batch["decoder_input_ids"] = batch["input_ids"]
    model = small(make, form)
    expected = logits(model, **batch)
    quantised = model.to_standalone(quantize=scheme)
    got = logits(quantised, **batch)
    assert 0 < relative_error(got, expected) < LARGEST_ERROR[scheme]
    assert torch.equal(logits(model, **batch), expected), "the PEFT model stays as it is"
    quantised.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    loaded = type(quantised).from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(loaded, **batch), got)
    quantised.save_pretrained(tmp_path / "a")
    type(quantised).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_the_file_is_as_much_smaller_as_it_should_be(scheme: str, bits: int, tmp_path: Path) -> None:
    plain, quantised = small().to_standalone(), small().to_standalone(quantize=scheme)
    numbers = sum(value.numel() for key, value in plain.state_dict().items() if key.endswith((".A.weight", ".B.weight")))
    plain.save_pretrained(tmp_path / "plain")
    quantised.save_pretrained(tmp_path / "quantised")
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "quantised"))
    saved = numbers * (32 - bits) // 8
    assert 0.75 * saved < before - after < saved  # scales take some, in rows as short as these


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_reader_needs_the_documented_arithmetic_only(scheme: str, tmp_path: Path) -> None:
    """docs/checkpoints.md, "Quantised factors"."""
    quantised = small().to_standalone(quantize=scheme)
    quantised.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quantization"] == scheme
    tensors = load_file(tmp_path / "model.safetensors")
    rank = quantised.config.quantization_config.layers[LAYER]["rank"]
    product = []
    for name, shape in (("A", (64, rank)), ("B", (rank, 64))):
        if scheme == "int8":
            matrix = tensors[f"{LAYER}.{name}.weight"].float() * tensors[f"{LAYER}.{name}.weight_scale"]
        else:
            packed = tensors[f"{LAYER}.{name}.weight"].flatten()
            numbers = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
            normal = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
            normal += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
            scales = tensors[f"{LAYER}.{name}.weight_absmax"].repeat_interleave(64)[: len(numbers)]
            matrix = torch.tensor(normal)[numbers] * scales
        product.append(matrix[: shape[0] * shape[1]].reshape(shape))
    x = torch.randn(5, 64)
    torch.testing.assert_close(quantised.get_submodule(LAYER)(x), x @ (product[0] @ product[1]).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.filterwarnings("ignore:.*reads this weight itself")
def test_models_that_read_weights_themselves(scheme: str, tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100, time_step_rank=16)
    model = small(lambda: MambaForCausalLM(config), rank_pattern={"dt_proj": 16})
    quantised = model.to_standalone(quantize=scheme)
    got = logits(quantised)
    assert 0 < relative_error(got, logits(model)) < LARGEST_ERROR[scheme]
    quantised.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), got)


def test_short_rows_stay_as_they_are(tmp_path: Path) -> None:
    small(rank_pattern={"q_proj": LEAST_INPUTS - 1}).to_standalone(quantize="int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{LAYER}.A.weight"].dtype == torch.float32
    assert tensors[f"{LAYER}.B.weight"].dtype == torch.int8


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_generate_and_bf16(scheme: str, tmp_path: Path) -> None:
    small(form="pivot").to_standalone(quantize=scheme).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False).shape == (1, 10)
    assert relative_error(logits(model).float(), logits(AutoModelForCausalLM.from_pretrained(tmp_path))) < 0.1
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_lora_on_quantised_factors_trains_and_the_factors_do_not(scheme: str, tmp_path: Path) -> None:
    small().to_standalone(quantize=scheme).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no", learning_rate=0.1
    )
    data = [{"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)}]
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, arguments, train_dataset=data)
    before = logits(model)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    Trainer(tuned, arguments, train_dataset=data).train()
    assert not torch.equal(logits(tuned), before)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`quantize` must be one of .*int8.*got 'int3'"):
        small().to_standalone(quantize="int3")


def test_a_missing_library_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small().to_standalone(quantize="int8").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        small().to_standalone(quantize="int8")
    with pytest.raises(ImportError, match="pip install torchao"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{LAYER}.A.weight", lambda t: t.float(), "dtype F32, where torch.int8 should be"),
        (f"{LAYER}.A.weight_scale", lambda t: t.to(torch.int8), "dtype I8, where torch.float32 should be"),
        (f"{LAYER}.A.weight_scale", lambda t: t * torch.nan, "NaN or infinite"),
        (f"{LAYER}.A.weight_scale", lambda t: t[:-1], "has shape"),
        (f"{LAYER}.A.weight_scale", lambda t: None, "is missing"),
    ],
)
def test_damaged_checkpoints(
    key: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    small().to_standalone(quantize="int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else {**tensors, key: changed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_unknown_scheme_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    small().to_standalone(quantize="int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["quantization"] = "int2"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"`quantization` in config\.json must be one of"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
