"""Base models that arrive quantised: their weights are dequantised one by one, and factors take their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.models import llama
from support.tolerances import relative_error
from support.versions import unless
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from reparam_peft import ReparamConfig, compress
from reparam_peft.layers.coded import CodedLinear
from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.layers.kinds import QUANTIZED, is_quantized
from reparam_peft.layers.quantized_bases import dequantized, stored_bytes, with_own_codes

IDS = torch.arange(3, 67).reshape(2, 32)


def nf4(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=dtype)


def in_order(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose 4 bits are multiplied in the dtype of the input on CPUs with instructions for bfloat16, too.

    With these bitsandbytes rounds scales and inputs to bfloat16 at the first pass, which costs about 0.3 % in each layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def nf4_with_nested_scales(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=dtype)


def fp4(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=dtype)


def eight_bits(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    how = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=dtype)


def torchao(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=dtype)


def hqq(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    quantize = pytest.importorskip("hqq.core.quantize")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    options = quantize.BaseQuantizeConfig(nbits=8, group_size=32)
    for layer in model.model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantize.HQQLinear(linear, options, compute_dtype=dtype, device="cpu"))
    return model


Load = Callable[[Path, torch.dtype], PreTrainedModel]
OF_LATER_CODES = unless("torchao", "0.17", "holds 8 bits in another class, whose codes are not kept")
BASES = pytest.mark.parametrize("load", [nf4, eight_bits, torchao, hqq])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    llama(intermediate_size=128).save_pretrained(path)  # bitsandbytes' 4 bits on a CPU take multiples of 64 only
    return path


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("computed_before", [False, True], ids=["fresh", "after a forward pass"])
def test_at_full_rank_the_dequantised_model_comes_back(
    load: Load, dtype: torch.dtype, computed_before: bool, folder: Path
) -> None:
    model = load(folder, dtype)
    expected = logits(load(folder, dtype))
    if computed_before:
        logits(model)
    small = get_peft_model(model, ReparamConfig(target_modules=TARGETS, r="full"), autocast_adapter_dtype=False)
    assert not any(is_quantized(module) for module in small.modules())
    assert {p.dtype for p in small.parameters()} == {dtype}
    # Eight bits of bitsandbytes round the inputs too; bfloat16 rounds the factors.
    assert relative_error(logits(small).float(), expected.float()) < (2e-2 if dtype == torch.bfloat16 else 1e-2)


@BASES
def test_nothing_of_the_quantised_weights_stays(load: Load, folder: Path) -> None:
    small = get_peft_model(load(folder, torch.float32), ReparamConfig(target_modules=TARGETS, keep=0.5))
    assert all(parameter.is_floating_point() for parameter in small.base_model.model.model.layers.parameters())
    report = small.size_report()
    assert report.keep <= 0.5
    assert sum(parameter.numel() for parameter in small.parameters()) == report.to_dict()["model"]["stored_parameters"]


@BASES
def test_save_load_merge_and_standalone(load: Load, folder: Path, tmp_path: Path) -> None:
    small = get_peft_model(load(folder, torch.float32), ReparamConfig(target_modules=TARGETS, keep=0.6, form="pivot"))
    expected = logits(small)
    small.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder, torch.float32), tmp_path / "adapter")), expected)
    plain = small.to_standalone()
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(tmp_path / "standalone")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "standalone")), expected)
    merged = small.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert relative_error(logits(merged), expected) < 1e-5


@BASES
def test_calibrated_compression_with_dense_matrices(load: Load, folder: Path, tmp_path: Path) -> None:
    model = load(folder, torch.float32)
    before = logits(model)
    dense = "model.layers.0.mlp.up_proj"
    config = ReparamConfig(target_modules=TARGETS, keep=0.8, dense_modules=[dense])
    small = compress(model, config, [{"input_ids": IDS}], progress=False)
    expected = logits(small)
    assert relative_error(expected, before) < 0.2
    plain = small.to_standalone()
    assert type(plain.get_submodule(dense)) is nn.Linear
    assert relative_error(logits(plain), expected) < 2e-2  # what stays dense is dequantised
    assert not plain.is_quantized
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert torch.equal(logits(small), expected), "the PEFT model stays as it is"


@OF_LATER_CODES
@pytest.mark.parametrize("load", [nf4, nf4_with_nested_scales, torchao])
def test_a_model_that_keeps_all_of_its_codes_becomes_standalone(load: Load, folder: Path) -> None:
    """Nothing of it is factorised, so that it has no layer of the adapter."""
    config = ReparamConfig(target_modules=TARGETS, keep=1.0, budget="bytes")
    with pytest.warns(UserWarning, match="All 14 targets stay dense"):
        small = compress(load(folder, torch.bfloat16), config, [{"input_ids": IDS}], progress=False)
    plain = small.to_standalone()
    assert sum(isinstance(module, FactorizedModule) for module in plain.modules()) == 14


@BASES
def test_dequantising_is_exact_before_and_after_computing(load: Load, folder: Path) -> None:
    layer = load(folder, torch.float32).model.layers[0].mlp.up_proj
    x = torch.randn(5, 64)
    plain = dequantized(layer)
    with torch.no_grad():
        assert relative_error(plain(x), layer(x)) < 1e-2
        assert relative_error(dequantized(layer)(x), plain(x)) < 1e-2
        assert relative_error(layer(x), plain(x)) < 1e-2


@pytest.mark.parametrize("ways", [{"sequential": True}, {"refine": True}])
def test_what_changes_dense_weights_is_refused(ways: dict[str, bool], folder: Path) -> None:
    model = load = nf4(folder, torch.float32)
    before = logits(load)
    with pytest.raises(ValueError, match="these are quantised"):
        compress(model, ReparamConfig(target_modules=TARGETS), [{"input_ids": IDS}], **ways, progress=False)
    assert torch.equal(logits(model), before)


def test_a_quantised_weight_is_not_kept(folder: Path) -> None:
    with pytest.raises(ValueError, match="`keep_base=True` cannot be honoured"):
        get_peft_model(nf4(folder, torch.float32), ReparamConfig(target_modules=TARGETS, keep_base=True))


@pytest.mark.parametrize("load", [nf4, torchao])
def test_corrected_bases_keep_their_codes_and_adapters_hold_factors_alone(load: Load, folder: Path, tmp_path: Path) -> None:
    base = in_order(load(folder, torch.float32))
    before = logits(base)
    config = ReparamConfig(target_modules=TARGETS, form="corrected", r=4)
    small = get_peft_model(base, config).eval()
    assert torch.equal(logits(small), before), "there is nothing to correct yet"
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.requires_grad:
                parameter += 0.02
    expected = logits(small)
    with small.disable_adapter():
        assert torch.equal(logits(small), before)
    small.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("reparam_factors.")[2] for name in stored} == {"A.weight", "B.weight"}
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(in_order(load(folder, torch.float32)), tmp_path, **options)
        assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="corrects the weight of a base model that arrives quantised, and here it does not"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    small.merge_adapter(safe_merge=True)
    assert relative_error(logits(small), expected) < 1e-5
    small.unmerge_adapter()
    assert torch.equal(logits(small), expected)
    targets = small.size_report().to_dict()["targets"]
    assert 0.2 < targets["stored_bytes"] / targets["dense_bytes"] < 0.45, "what is corrected is needed, too"
    with pytest.raises(ValueError, match="which a standalone model does not have"):
        small.to_standalone()
    unloaded = small.unload()
    assert torch.equal(logits(unloaded), before)
    assert is_quantized(unloaded.model.layers[0].mlp.up_proj)


def test_there_is_nothing_to_fit_a_correction_of_a_quantised_base_to(folder: Path) -> None:
    config = ReparamConfig(target_modules=TARGETS, form="corrected", r=4)
    with pytest.raises(ValueError, match="there is nothing to fit a correction to; use `get_peft_model`"):
        compress(nf4(folder, torch.float32), config, [{"input_ids": IDS}], progress=False)


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers of quantised layers as they are stored, by the ends of their names."""
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if is_quantized(m)}
    return {name: getattr(layer.weight.data, "qdata", layer.weight.data).view(torch.uint8) for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("load", "dtype", "bits"),
    [
        (nf4, torch.float32, 4),
        (nf4_with_nested_scales, torch.bfloat16, 4),
        (eight_bits, torch.bfloat16, 8),
        pytest.param(torchao, torch.bfloat16, 8, marks=OF_LATER_CODES),
        (fp4, torch.float32, None),
    ],
)
def test_under_a_budget_of_bytes_dense_matrices_keep_the_codes_in_which_they_arrived(
    load: Load, dtype: torch.dtype, bits: int | None, folder: Path, tmp_path: Path
) -> None:
    model = in_order(load(folder, dtype))
    arrived = {name: numbers.clone() for name, numbers in codes(model).items()}
    takes = {name: stored_bytes(module) for name, module in model.named_modules() if is_quantized(module)}
    own = 73_728 * dtype.itemsize
    fixed = "model.layers.0.mlp.up_proj"
    config = ReparamConfig(target_modules=TARGETS, budget="bytes", keep=0.93 * sum(takes.values()) / own, dense_modules=[fixed])
    small = compress(model, config, [{"input_ids": IDS}], progress=False)
    resolved = small.peft_config["default"]
    assert fixed in resolved.dense_modules
    targets = small.size_report().to_dict()["targets"]
    kept = {name: codes for name, codes in arrived.items() if name in resolved.dense_modules}
    assert 0.8 * sum(takes.values()) < targets["stored_bytes"] <= 0.93 * sum(takes.values())
    expected = logits(small)
    small.save_pretrained(tmp_path / "adapter")
    assert not any(fixed in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(in_order(load(folder, dtype)), tmp_path / "adapter")
    small.merge_adapter()
    small.unmerge_adapter()
    for made in (small, again):
        present = codes(made)
        assert present.keys() == kept.keys()
        assert all(torch.equal(present[name], kept[name]) for name in kept)
        assert relative_error(logits(made).float(), expected.float()) < (1e-6 if dtype == torch.float32 else 1e-2)
    if bits is None:
        with pytest.warns(UserWarning, match=f"{len(kept)} matrices keep the codes .* a standalone model has no such codes"):
            assert type(small.to_standalone().get_submodule(fixed)) is nn.Linear
        return
    plain = small.to_standalone()
    plain.save_pretrained(tmp_path / "standalone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "standalone", dtype=dtype)
    assert torch.equal(logits(loaded), logits(plain))
    assert relative_error(logits(plain).float(), expected.float()) < (1e-6 if dtype == torch.float32 else 2e-2)
    for name in kept:
        piece, matrix = loaded.get_submodule(name).B, QUANTIZED.own_matrix(small.get_submodule(f"base_model.model.{name}"))
        assert isinstance(piece, CodedLinear)
        assert piece.bits == bits
        assert torch.equal(piece.weight.view(torch.uint8).flatten(), kept[name].flatten())
        assert relative_error(piece.matrix(torch.float32), matrix.float()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_codes_that_were_filled_in_by_assignment_are_kept_reported_and_saved(folder: Path, tmp_path: Path) -> None:
    """As a loader leaves them, before any pass: bitsandbytes puts its own tensors back in the first."""
    fixed = "model.layers.0.mlp.up_proj"
    config = ReparamConfig(target_modules=TARGETS, budget="bytes", keep=0.13, dense_modules=[fixed])
    small = compress(in_order(nf4(folder, torch.float32)), config, [{"input_ids": IDS}], progress=False)
    expected, report = logits(small), small.size_report().to_dict()
    layer = small.get_submodule(f"base_model.model.{fixed}")
    layer.load_state_dict({"weight": layer.weight.data.clone()}, strict=False, assign=True)
    assert type(layer.weight) is nn.Parameter
    assert small.size_report().to_dict() == report
    plain = small.to_standalone()
    assert plain.get_submodule(fixed).dtype == torch.float32
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(plain))
    assert relative_error(logits(plain), expected) < 1e-6


@OF_LATER_CODES
def test_codes_that_a_standalone_model_has_are_those_of_its_schemes(folder: Path) -> None:
    layer = torchao(folder, torch.float32).model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    made = with_own_codes(layer)
    assert made is not None
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative_error(made(x), layer(x)) < 1e-6
    layer.weight.data.zero_point.fill_(1)
    assert with_own_codes(layer) is None, "no scheme has a number that stands for zero"
