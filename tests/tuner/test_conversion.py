"""Standalone models and checkpoints: what they compute, how they load, and what stock transformers makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.few_bits import FEW_BITS
from support.models import bert, byte_tokenizer, gpt2, llama, t5, token_inputs, vit
from support.processes import run_stock
from support.standalone import IDS, NARROW, STOCK, logits, saved, small
from support.tolerances import assert_close
from support.versions import unless
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from reparam_peft import ReparamConfig, compress
from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.standalone.checkpoint import CheckpointLoader


@pytest.mark.parametrize("form", ["factors", "pivot", NARROW, FEW_BITS])
def test_the_same_class_and_the_same_numbers(form: str, tmp_path: Path) -> None:
    model = small(form)
    expected = logits(model)
    plain = model.to_standalone()
    assert type(plain) is LlamaForCausalLM
    assert not any(type(module).__module__.startswith("peft.") for module in plain.modules())
    assert not hasattr(plain, "peft_config")
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(model), expected), "the PEFT model stays as it is"
    assert plain.num_parameters() < llama().num_parameters()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert [*loaded.state_dict()] == [*plain.state_dict()]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_no_memory_is_needed_for_a_second_model() -> None:
    model = small()
    before = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in model.to_standalone().parameters()} <= before


def test_no_dense_weight_is_created_in_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CheckpointLoader._process_model_before_weight_loading
    seen = []

    def watched(self: CheckpointLoader, model: PreTrainedModel, **kwargs: object) -> None:
        seen.extend(parameter.device.type for parameter in model.parameters())
        build(self, model, **kwargs)

    monkeypatch.setattr(CheckpointLoader, "_process_model_before_weight_loading", watched)
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    assert set(seen) == {"meta"}
    dense = {module.weight.shape for module in llama().model.layers.modules() if isinstance(module, nn.Linear)}
    assert not {parameter.shape for parameter in loaded.model.layers.parameters()} & dense


@pytest.mark.parametrize(
    ("make", "form"),
    [
        *product([gpt2, bert, t5, vit, partial(llama, tie_word_embeddings=False)], ["factors", "pivot"]),
        *((make, NARROW) for make in (gpt2, bert)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "embedding"),
)
def test_other_architectures(make: Callable[[], PreTrainedModel], form: str, tmp_path: Path) -> None:
    batch: dict[str, torch.Tensor] = token_inputs()
    options = {}
    if make is vit:
        batch, options = {"pixel_values": torch.rand(2, 3, 16, 16)}, {"target_modules": ["projection", "query", "up_proj"]}
    elif make is t5:
        batch["decoder_input_ids"] = IDS
    elif isinstance(make, partial):
        options = {"target_modules": ["embed_tokens", "q_proj"]}
    model = small(form, make(), **options)
    with torch.no_grad():
        expected = model(**batch).logits
    plain = model.to_standalone()
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, expected)
        assert torch.equal(loaded(**batch).logits, expected)


def test_sharded_files(tmp_path: Path) -> None:
    plain = small("pivot").to_standalone()
    plain.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_dtypes(tmp_path: Path) -> None:
    plain = small("pivot").to_standalone()
    plain.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_close(logits(half), logits(plain), torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert torch.equal(logits(auto), logits(half))


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_offloading_to_disk(form: str, tmp_path: Path) -> None:
    plain = small(form).to_standalone()
    plain.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map = {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(loaded), logits(plain))


def test_other_auto_classes_from_one_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = body(input_ids=IDS).last_hidden_state
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden, expected)
    body.save_pretrained(tmp_path / "body")
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "body").model(input_ids=IDS).last_hidden_state
    assert torch.equal(back, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert sum(isinstance(module, FactorizedModule) for module in classifier.modules()) == 14


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    plain = small(model=llama(tie_word_embeddings=True)).to_standalone()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(plain))


def test_whole_modules_of_the_adapter_come_along(tmp_path: Path) -> None:
    model = small(model=bert(), modules_to_save=["classifier"], target_modules=["query", "value"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1.0
    expected = logits(model)
    plain = model.to_standalone()
    assert isinstance(plain.classifier, nn.Linear)
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), expected)


def test_a_refined_model_with_dense_targets(tmp_path: Path) -> None:
    batches = [{"input_ids": torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    model = compress(llama(), ReparamConfig(target_modules="all-linear", keep=0.7), batches, refine=True, progress=False).eval()
    expected = logits(model)
    model.to_standalone().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_the_active_adapter_of_several() -> None:
    model = small(keep_base=True)
    model.add_adapter("other", ReparamConfig(target_modules="all-linear", r=4, keep_base=True))
    model.set_adapter("other")
    plain = model.to_standalone()
    assert torch.equal(logits(plain), logits(model))
    assert {module.rank for module in plain.modules() if isinstance(module, FactorizedModule)} == {4}
    with model.disable_adapter(), pytest.raises(ValueError, match="use `unload`"):
        model.to_standalone()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="set_adapter"):
        model.to_standalone()


def test_a_merged_adapter_is_refused() -> None:
    model = small()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.to_standalone()
    model.unmerge_adapter()
    model.to_standalone()


def test_a_plain_pytorch_model_is_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), ReparamConfig(target_modules=["0"], r=2))
    with pytest.raises(TypeError, match="transformers model"):
        model.to_standalone()


def test_generation_pipeline_copies_and_casts(tmp_path: Path) -> None:
    saved(tmp_path, "pivot", model=llama(vocab_size=259))
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    cached = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, loaded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False))
    assert torch.equal(cached, copy.deepcopy(loaded).generate(IDS, max_new_tokens=6, do_sample=False))
    made = pipeline("text-generation", str(tmp_path))("a b c", max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"]
    assert {parameter.dtype for parameter in loaded.half().float().parameters()} == {torch.float32}


@unless("torch", "2.8", "compiles no model at once whose config describes a quantization")
def test_compile_and_export(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path, "pivot"))
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    assert_close(logits(compiled), logits(loaded))
    exported = torch.export.export(loaded, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    assert_close(exported.module()(input_ids=IDS, use_cache=False).logits, logits(loaded))


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "start", "pivot"))
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def trainer(model: nn.Module) -> Trainer:
        options = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
        return Trainer(model, TrainingArguments(tmp_path / "run", **options, disable_tqdm=True), train_dataset=rows)

    before = logits(loaded)
    trainer(loaded).train()
    after = logits(loaded.eval())
    assert not torch.equal(after, before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")), after)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer(fresh).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(logits(fresh.eval()), after)


def test_lora_on_top(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"))
    model = get_peft_model(loaded, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    assert torch.equal(logits(again), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("case", ["pivot", "full rank", "sharded"])
def test_stock_transformers_fails_rather_than_to_make_up_weights(case: str, auto: str, tmp_path: Path) -> None:
    model = small("pivot") if case != "full rank" else small(keep=1.0, r="full")
    model.to_standalone().save_pretrained(tmp_path, max_shard_size="50KB" if case == "sharded" else "50GB")
    done = run_stock(STOCK, auto, tmp_path)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.output.splitlines()[-1]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_beside_numbers_in_few_bits_is_quantised_too(scheme: str, tmp_path: Path) -> None:
    model = small(FEW_BITS)
    plain = model.to_standalone(quantize=scheme)
    expected = logits(plain)
    assert (expected - logits(model)).abs().max() < 0.05
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
