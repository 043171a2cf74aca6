"""The whole way on another device than the processor: what is computed there is what the processor computes, and stays there.

It is a GPU, where there is one, and else a device for tests that refuses what a GPU refuses (`support/second_device.py`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model
from support.batches import text
from support.block_by_block import TEXT as LONG
from support.block_by_block import WAYS
from support.compressing import ALL, batches_of, config_of, layers
from support.experts import LAYOUTS, fused, routing
from support.few_bits import FEW_BITS
from support.healing import ROWS, Time, falls, losses
from support.healing import small as healed_case
from support.models import CASES, Case, bert, byte_tokenizer, gpt_oss, llama, mixture, qwen_moe, token_inputs
from support.second_device import NAME, other_device
from support.standalone import IDS, NARROW
from support.standalone import small as standalone_case
from support.tolerances import TOLERANCE, assert_close, relative_error
from support.versions import is_unable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, TrainingArguments

from reparam_peft import HealingTrainer, ReparamConfig, Statistics, calibrate, compress, perplexity, save_onnx, self_written
from reparam_peft.blockwise.anchoring import Deviation
from reparam_peft.healing import clock
from reparam_peft.healing.teacher_cache import TeacherCache
from reparam_peft.layers import grouped_experts
from reparam_peft.layers.pivot_expansion import PivotExpansion
from reparam_peft.numerics import autoencoder, grams
from reparam_peft.numerics.methods import METHODS
from reparam_peft.numerics.neurons import eliminate, refitted

DEVICE = other_device()
pytestmark = pytest.mark.usefixtures("found_by_accelerate")
OF_DEVICE = 2e-3  # relative deviation of what another device computes in float32: cuDNN's convolutions take TF32
CALIBRATED = sorted(set(METHODS) - {"svd"})


@pytest.fixture(autouse=True)
def no_compilation() -> Iterator[None]:
    """No `torch.compile` on the second device: it has no compiler, and bitsandbytes would take half a minute."""
    with torch.compiler.set_stance("force_eager" if DEVICE == NAME else "default"):
        yield


def moved(batches: Any, device: str = DEVICE) -> Any:
    """A batch, or batches, on a device."""
    return send_to_device(batches, device)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**moved(inputs))
    made = result if isinstance(result, Tensor) else result.logits
    assert made.device.type == DEVICE
    return made.cpu()


def assert_all_there(model: nn.Module, place: str = DEVICE) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {tensor.device.type for tensor in tensors.values()} == {torch.device(place).type}


def matrices(small: PeftModel) -> dict[str, Tensor]:
    return {name: layer.dense_matrix("default").detach().cpu().float() for name, layer in layers(small).items()}


def assert_same_products(got: PeftModel, expected: PeftModel, tolerance: float = OF_DEVICE) -> None:
    """The same matrices, to rounding: ranks and pivots are chosen alike."""
    here, there = matrices(expected), matrices(got)
    assert here.keys() == there.keys()
    errors = {name: relative_error(there[name], matrix) for name, matrix in here.items()}
    assert max(errors.values()) <= tolerance, errors


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.matmul,
    "sum": torch.add,
    "list": lambda x, y: torch.cat([x, y]),
    "layer": F.linear,
    "convolution": lambda x, y: F.conv1d(x[None], y[:, :, None]),
    "rows": lambda x, y: x.index_select(0, y[0].long()),
    "in place": lambda x, y: x.mul_(y),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_device_refuses_tensors_of_another(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    if DEVICE == "cpu":
        pytest.skip("needs two devices")
    x, y = torch.ones(3, 3), torch.ones(3, 3)
    assert call(x.to(DEVICE), y.to(DEVICE)).device.type == DEVICE
    for first, second in ((x.to(DEVICE), y), (x.clone(), y.to(DEVICE))):
        with pytest.raises(RuntimeError, match=r"same device|type"):
            call(first, second)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, torch.randperm])
def test_the_device_refuses_a_generator_of_the_processor(draw: Callable[..., Tensor]) -> None:
    if DEVICE == "cpu":
        pytest.skip("needs two devices")
    with pytest.raises(RuntimeError, match="type for generator"):
        draw(3, generator=torch.Generator(), device=DEVICE)


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("method", CALIBRATED)
def test_a_compressed_model_is_the_same_and_goes_all_ways(
    case: Case, method: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"target_modules": case.target_modules, "method": method, "form": form, "allocation": "uniform", "neurons": False}
    monkeypatch.setattr(autoencoder, "train_autoencoder", partial(autoencoder.train_autoencoder, steps=20))
    small = compress(case.model().to(DEVICE), config_of(**options), moved(batches_of(case)), progress=False).eval()
    assert_all_there(small)
    if method != "autoencoder":  # which draws its rows where it trains
        assert_same_products(small, compress(case.model(), config_of(**options), batches_of(case), progress=False))
    whole = output(small, case.inputs())

    small.save_pretrained(tmp_path)
    assert_close(output(PeftModel.from_pretrained(case.model().to(DEVICE), tmp_path).eval(), case.inputs()), whole)
    assert_close(output(PeftModel.from_pretrained(case.model(), tmp_path).to(DEVICE).eval(), case.inputs()), whole)
    on_cpu = PeftModel.from_pretrained(case.model(), tmp_path, torch_device="cpu").eval()
    assert relative_error(case.output(on_cpu), whole) <= OF_DEVICE

    with small.disable_adapter() if small.peft_config["default"].keep_base else torch.no_grad():
        assert output(small, case.inputs()).isfinite().all()
    small.merge_adapter(safe_merge=True)
    assert relative_error(output(small, case.inputs()), whole) <= OF_DEVICE
    small.unmerge_adapter()
    assert_close(output(small, case.inputs()), whole)
    assert relative_error(output(small.merge_and_unload(), case.inputs()), whole) <= OF_DEVICE


@pytest.mark.parametrize("options", [{}, {"keep": 0.35}, {"neurons": False, "budget": "flops"}, {"rank_multiple": 8}], ids=str)
def test_ranks_are_chosen_alike(options: dict[str, Any]) -> None:
    expected = compress(llama(), config_of(**ALL, **options), LONG, progress=False)
    small = compress(llama().to(DEVICE), config_of(**ALL, **options), moved(LONG), progress=False)
    ours, theirs = (model.peft_config["default"] for model in (small, expected))
    assert abs(ours.stored_parameters - theirs.stored_parameters) <= 0.02 * theirs.dense_parameters
    assert ours.predicted_loss == pytest.approx(theirs.predicted_loss, rel=0.05)
    assert relative_error(output(small, token_inputs()), CASES[0].output(expected)) < 0.2


@pytest.mark.parametrize("size", [1, 7, 40])
def test_sums_in_several_blocks_are_those_of_the_processor(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "WIDE_BLOCK", 8)
    X, D = (torch.randn(30, count, generator=torch.Generator().manual_seed(count)) for count in (size, 20))
    made = []
    for place in ("cpu", DEVICE):
        x, deviations = X.to(place), D.to(place)
        for sums in (None, x.sum(0, dtype=torch.float64)):
            total = grams.packed_zeros(size, x.device)
            grams.add_gram(total, x, sums)
            whole = grams.unpack(total)
            assert torch.equal(grams.pack(whole), total)
            between = Deviation.between(20, size, x.device)
            between.add(deviations, x)
            made.append((whole.cpu(), between.cross.cpu()))
    for of_processor, of_device in zip(made[:2], made[2:], strict=True):
        for expected, got in zip(of_processor, of_device, strict=True):
            assert relative_error(got, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("place", ["cpu", DEVICE])
def test_neurons_go_alike_wherever_the_metrics_are(place: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, X, G = (torch.randn(shape, generator=generator) for shape in ((6, 20), (60, 20), (40, 6)))
    gram, fisher = (X.mT @ X).double() / 60, (G.mT @ G).double() / 40
    expected = eliminate(W, gram, fisher, 5, spectra_at=[12])
    got = eliminate(W.to(DEVICE), gram.to(place), fisher.to(place), 5, spectra_at=[12])
    assert got.order.tolist() == expected.order.tolist()
    assert_close(got.losses.cpu(), expected.losses)
    assert_close(got.spectra[0].cpu(), expected.spectra[0])
    kept = expected.kept(7)
    assert_close(refitted(W.to(DEVICE), gram.to(place), kept.to(place)).cpu(), refitted(W, gram, kept))


def test_batches_that_are_elsewhere_are_moved_and_statistics_go_to_files(tmp_path: Path) -> None:
    config = config_of(**ALL)
    known = calibrate(llama().to(DEVICE), config, LONG, progress=False)
    known.save(tmp_path / "statistics")
    again = Statistics.load(tmp_path / "statistics")
    for place in ("cpu", DEVICE):
        small = compress(llama().to(DEVICE), config, again, progress=False)
        other = compress(llama().to(place), config, known, progress=False)
        assert_same_products(small, other)


@pytest.mark.parametrize("seen", [{"max_memory": "1MiB"}, {}], ids=str)
def test_little_memory_gives_the_same(seen: dict[str, Any]) -> None:
    small = compress(llama().to(DEVICE), config_of(**ALL), moved(LONG), progress=False, **seen)
    assert_all_there(small)
    expected = compress(llama(), config_of(**ALL), LONG, progress=False)
    assert_same_products(small, expected, 0.02)


def test_pivots_are_set_from_anywhere() -> None:
    for made_on, of in itertools.product([DEVICE, "cpu", "meta"], [DEVICE, "cpu"]):
        expansion = PivotExpansion(None, 2, 5, -1, torch.device(made_on))
        expansion.set_pivots(torch.tensor([1, 3], device=of))
        assert expansion.mask.device.type == expansion.order.device.type == (of if made_on == "meta" else made_on)
        assert expansion.pivots.tolist() == [1, 3]


@cache
def perplexity_on_the_processor(way: str) -> float:
    return perplexity(compress(llama(), config_of(**ALL), LONG, progress=False, **WAYS[way]).eval(), LONG)


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("way", WAYS)
def test_block_by_block_on_the_device(way: str, place: str) -> None:
    """The model is there, or one block at a time goes there."""
    arguments = WAYS[way] | ({"device": DEVICE} if place == "cpu" else {})
    small = compress(llama().to(place), config_of(**ALL), moved(LONG, place), progress=False, **arguments).eval()
    assert_all_there(small, place)
    assert perplexity(small, moved(LONG, place)) == pytest.approx(perplexity_on_the_processor(way), rel=0.02)


def test_a_model_that_is_offloaded_to_the_processor_is_refused() -> None:
    """Half of its blocks, as `device_map="auto"` puts there what does not fit."""
    if DEVICE == "cpu":
        pytest.skip("needs two devices")
    parts = ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head")
    where = {**dict.fromkeys(parts, f"{DEVICE}:0"), "model.layers.1": "cpu"}
    model = dispatch_model(llama(), where, main_device=f"{DEVICE}:0", force_hooks=True)
    for way in ({}, {"sequential": True}):
        with pytest.raises(ValueError, match="Load the model without offloading"):
            compress(model, config_of(**ALL), moved(LONG), progress=False, **way)


RUNS: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "without neurons": {"neurons": False},
    "bytes": {"budget": "bytes"},
    "corrected": {"form": "corrected", "r": 4, "allocation": "uniform", "neurons": False},
}


@pytest.mark.parametrize("build", [llama, qwen_moe])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("first", ["cpu", DEVICE])
def test_a_run_that_goes_on_leaves_all_on_the_device(build: Any, options: dict[str, Any], first: str, tmp_path: Path) -> None:
    config = {**ALL, **options} | ({"target_parameters": "all-experts"} if build is qwen_moe else {})
    for place in (first, DEVICE):
        model, batches = build().to(place), moved(LONG, place)
        small = compress(model, config_of(**config), batches, run_folder=tmp_path, progress=False).eval()
    assert_all_there(small)
    assert output(small, token_inputs()).isfinite().all()


DRAWING: dict[str, dict[str, Any]] = {  # ways that draw numbers, or make tensors, of their own
    "one-shot": {},
    "block by block": {"ways": WAYS["both"]},
    "its own text": {"ways": {"batches": "self", "tokenizer": byte_tokenizer()}},
    "little memory": {"ways": {"max_memory": "1MiB"}},
    "few bits": {"config": {"budget": "bytes", "keep": 0.4}},
    "experts": {"build": qwen_moe, "config": {"target_parameters": "all-experts"}},
}


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("way", DRAWING.values(), ids=DRAWING)
def test_the_default_device_may_be_another(way: dict[str, Any], place: str, tmp_path: Path) -> None:
    build, config = way.get("build", partial(llama, vocab_size=259)), config_of(**ALL, **way.get("config", {}))

    def small(model: nn.Module, batches: Any, **more: Any) -> PeftModel:
        return compress(model, config, progress=False, **{"batches": batches, **way.get("ways", {}), **more})

    expected, model = small(build(), LONG), build().to(place)
    with torch.device(DEVICE):
        got = small(model, moved(LONG, place), run_folder=tmp_path)
    assert_all_there(got, place)
    assert_same_products(got, expected)


@pytest.mark.parametrize("default", [None, DEVICE])
def test_rows_may_be_on_the_device(default: str | None) -> None:
    rows = [{"input_ids": batch["input_ids"][i]} for batch in LONG for i in range(2)]
    ragged = [{name: row[: 20 - i] for name, row in row.items()} for i, row in enumerate(rows)]
    expected = compress(llama(), config_of(**ALL), ragged, progress=False)
    with torch.device(default) if default else nullcontext():
        got = compress(llama(), config_of(**ALL), moved(ragged), progress=False)
    assert_same_products(got, expected)


def test_a_teacher_is_remembered_whatever_the_default_device(tmp_path: Path) -> None:
    known, rows = TeacherCache(tmp_path, 8, "known"), text([12, 7], 12)
    logits = llama()(**rows).logits.detach()
    with torch.device(DEVICE):
        known.write(moved(rows), logits.to(DEVICE))
        read = known.read(rows)
    assert read is not None
    assert read.indices.device.type == "cpu"
    top = logits.log_softmax(-1).topk(8).values.sort(-1).values
    assert_close(read.log_probabilities.sort(-1).values[0, :-1], top[0, :-1])


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("form", ["factors", "pivot", NARROW, FEW_BITS])
def test_standalone_models_load_and_generate(form: str, quantize: str | None, tmp_path: Path) -> None:
    if quantize and form == FEW_BITS:
        pytest.skip("is in few bits already")
    model = standalone_case(form, llama(hidden_size=64, intermediate_size=128)).to(DEVICE)
    expected = output(model, {"input_ids": IDS})
    plain = model.to_standalone(**({"quantize": quantize} if quantize else {}))
    assert_all_there(plain)
    own = output(plain, {"input_ids": IDS})
    assert relative_error(own, expected) <= (0.2 if quantize else OF_DEVICE)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    assert_all_there(loaded)
    assert relative_error(output(loaded, {"input_ids": IDS}), own) <= OF_DEVICE
    made = loaded.generate(IDS.to(DEVICE), max_new_tokens=5, do_sample=False)
    assert made.shape == (2, 13)
    static = loaded.generate(IDS.to(DEVICE), max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert static.shape == (2, 13)


@pytest.mark.parametrize("form", ["factors", "pivot", NARROW])
def test_standalone_models_compile(form: str) -> None:
    if DEVICE == NAME:
        pytest.skip("PyTorch has no compiler for this device")
    plain = standalone_case(form).to_standalone().to(DEVICE)
    expected = output(plain, {"input_ids": IDS})
    for module in plain.model.layers:
        module.compile()
    assert relative_error(output(plain, {"input_ids": IDS}), expected) <= OF_DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["factors", "pivot", NARROW, FEW_BITS])
def test_half_precision_computes_about_the_same(form: str, dtype: torch.dtype) -> None:
    plain = standalone_case(form).to_standalone().to(DEVICE)
    expected = output(plain, {"input_ids": IDS})
    half = copy.deepcopy(plain).to(dtype)
    got = output(half, {"input_ids": IDS})
    assert got.dtype == dtype
    assert relative_error(got, expected) <= 2 * TOLERANCE[dtype]
    if DEVICE == "cuda":
        with torch.autocast(DEVICE, dtype):
            assert relative_error(output(plain, {"input_ids": IDS}), expected) <= 2 * TOLERANCE[dtype]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual = {"max_steps": 9, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none", "logging_steps": 1}
    usual |= {"use_cpu": DEVICE == "cpu", "save_strategy": "no", "disable_tqdm": True}
    if DEVICE == NAME and "bf16" in options:
        pytest.skip("`Trainer` knows no half precision of a device that it does not know")
    return TrainingArguments(str(folder), **{**usual, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": 0.5, "distillation": 0.5},
        {"quantize": "int8"},
        {"quantize": "int4"},
        {"minutes": 0.1},
        {"teacher_cache": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_healing_trains_on_the_device(
    options: dict[str, Any], precision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(options)
    monkeypatch.setattr(clock, "time", Time(0.5))  # twelve steps in a tenth of a minute
    if options.get("teacher_cache"):
        options["teacher_cache"] = tmp_path / "cache"
    small = healed_case()
    how = arguments(tmp_path, **precision, **({"max_steps": -1} if "minutes" in options else {}))
    trainer = HealingTrainer(small, how, train_dataset=ROWS, teacher=llama(), **options)
    trainer.train()
    assert trainer.state.global_step == (12 if "minutes" in options else 9)
    assert falls(trainer) or "hidden" in options, losses(trainer)
    assert all(loss == loss for loss in losses(trainer))
    assert_all_there(small)
    small.save_pretrained(tmp_path / "healed")
    tolerance = TOLERANCE[torch.bfloat16] if "bf16" in precision else OF_DEVICE  # accelerate leaves autocast on the model
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "healed").to(DEVICE).eval()
    assert relative_error(output(loaded, token_inputs()), output(small.eval(), token_inputs())) <= tolerance


def test_healing_goes_on_from_a_checkpoint_on_the_device(tmp_path: Path) -> None:
    def healed(folder: Path, **options: Any) -> PeftModel:
        small = healed_case()
        how = arguments(folder, save_strategy="steps", save_steps=3, **options)
        HealingTrainer(small, how, train_dataset=ROWS, teacher=llama()).train(resume_from_checkpoint=checkpoint)
        return small.eval()

    checkpoint = None
    expected = healed(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-3")
    assert Path(checkpoint).exists()
    again = healed(tmp_path)
    assert_same_products(again, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_computed_together_as_one_by_one(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "DEVICES", {DEVICE})
    experts = fused(layout)
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.6, init_weights=False)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.experts(*inputs)

    small = get_peft_model(Layer(), config, autocast_adapter_dtype=False).to(DEVICE, dtype)
    inputs = [tensor.to(DEVICE) if not tensor.is_floating_point() else tensor.to(DEVICE, dtype) for tensor in routing(64)]
    found = {}
    for way in ("eager", "grouped_mm"):
        small.get_base_model().experts.config._experts_implementation = way
        small.zero_grad()
        made = small(*inputs)
        made.float().square().sum().backward()
        found[way] = {"": made, **{name: p.grad for name, p in small.named_parameters() if p.requires_grad}}
    for name, expected in found["eager"].items():
        assert relative_error(found["grouped_mm"][name], expected) <= 4 * TOLERANCE[dtype], name


@pytest.mark.parametrize("build", [qwen_moe, gpt_oss])
def test_mixtures_are_compressed_healed_and_saved(build: Any, tmp_path: Path) -> None:
    config = ReparamConfig(target_modules="all-linear", target_parameters="all-experts", keep=0.5, rank_multiple=1)
    batches = [text([24, 20, 24, 17], 24)]
    small = compress(build().to(DEVICE), config, moved(batches), progress=False).eval()
    whole = output(small, token_inputs())
    for way in ("eager", "grouped_mm"):
        small.get_base_model().set_experts_implementation(way)
        assert relative_error(output(small, token_inputs()), whole) <= OF_DEVICE
    plain = small.to_standalone()
    plain.save_pretrained(tmp_path / "standalone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "standalone", device_map=DEVICE)
    assert relative_error(output(loaded, token_inputs()), whole) <= OF_DEVICE
    teacher = build()
    if DEVICE == NAME:
        teacher.set_experts_implementation("eager")
    before = {name: p.detach().clone() for name, p in small.named_parameters() if p.requires_grad}
    trainer = HealingTrainer(small, arguments(tmp_path), train_dataset=ROWS, teacher=teacher)
    trainer.train()
    after = dict(small.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert sum(bool((after[name] != value).any()) for name, value in before.items()) > len(before) / 2


def test_a_mixture_of_modules_is_compressed() -> None:
    batches = [{"x": torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
    config = config_of(target_modules="all-linear")
    small = compress(mixture().to(DEVICE), config, moved(batches), progress=False)
    expected = compress(mixture(), config, batches, progress=False)(**batches[0]).detach()
    assert relative_error(output(small, batches[0]), expected) < 0.05


BASES = {
    "nf4": lambda dtype: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    "nested": lambda dtype: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=dtype, bnb_4bit_compute_dtype=dtype
    ),
    "int8": lambda dtype: BitsAndBytesConfig(load_in_8bit=True),
}


def torchao_int8(_: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("base", [*BASES, "torchao"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_bases_are_compressed_on_the_device(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if base == "torchao" else "bitsandbytes")
    if DEVICE == NAME and base == "int8":
        pytest.skip("bitsandbytes does not know the device")
    llama(intermediate_size=128).save_pretrained(tmp_path / "dense")

    def load() -> Any:
        how = {**BASES, "torchao": torchao_int8}[base](dtype)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=how, device_map=DEVICE, dtype=dtype)

    # bitsandbytes rounds inputs to 8 bits, and on some processors, scales to bfloat16.
    tolerance = max(1e-2, 2 * TOLERANCE[dtype])
    before = output(load(), {"input_ids": IDS}).float()
    config = ReparamConfig(target_modules="all-linear", keep=0.8, neurons=False)
    small = compress(load(), config, [{"input_ids": IDS.to(DEVICE)}], progress=False)
    whole = output(small, {"input_ids": IDS})
    assert relative_error(whole.float(), before) < 0.3
    small.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert relative_error(output(loaded, {"input_ids": IDS}), whole) <= tolerance
    plain = small.to_standalone()
    assert relative_error(output(plain, {"input_ids": IDS}), whole) <= tolerance


@pytest.mark.parametrize("base", ["nf4", "nested", "torchao"])
def test_quantised_bases_keep_codes_within_a_budget_of_bytes(base: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if base == "torchao" else "bitsandbytes")
    llama(intermediate_size=128).save_pretrained(tmp_path / "dense")
    how = {**BASES, "torchao": torchao_int8}[base](torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=how, device_map=DEVICE, dtype=torch.bfloat16
    )
    config = ReparamConfig(target_modules="all-linear", keep=0.5, budget="bytes")
    small = compress(model, config, [{"input_ids": IDS.to(DEVICE)}], progress=False)
    whole = output(small, {"input_ids": IDS})
    assert whole.isfinite().all()
    if base == "nested":  # all keep codes that are stored as bfloat16, for which a standalone model has no form
        with pytest.raises(ValueError, match="the model is a dense one"):
            small.to_standalone()
    else:
        small.to_standalone().save_pretrained(tmp_path / "small")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=DEVICE)
        assert relative_error(output(loaded, {"input_ids": IDS}), whole) <= 2 * TOLERANCE[torch.bfloat16]


def test_a_model_writes_its_own_text_on_the_device() -> None:
    model = llama(vocab_size=259).to(DEVICE)
    batches = self_written(model, byte_tokenizer(), 4, 16, progress=False)
    assert sum(len(batch["input_ids"]) for batch in batches) == 4
    small = compress(model, config_of(**ALL), batches, progress=False)
    assert perplexity(small, batches) > 1


def test_onnx_files_are_written_of_models_on_the_device(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if is_unable("torch", "2.10") or is_unable("transformers", "5.22"):
        pytest.skip("they are too old for ONNX files")
    plain = standalone_case("pivot", bert()).to_standalone().to(DEVICE)
    with torch.device(DEVICE):
        save_onnx(plain, tmp_path)
    assert (tmp_path / "model.onnx").exists()
    assert_all_there(plain)


def test_models_are_loaded_onto_the_device_and_compressed_in_one_call(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto" if DEVICE == "cuda" else DEVICE)
    small = compress(model, config_of(**ALL), LONG, progress=False)
    assert_all_there(small)
    assert_all_there(small.to_standalone())
    assert small.generate(input_ids=IDS.to(DEVICE), max_new_tokens=4, do_sample=False).shape == (2, 12)
