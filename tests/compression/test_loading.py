"""Compression while loading: `from_pretrained(dense, quantization_config=ReparamConfig(…))`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.models import bert, gpt2, llama, t5, token_inputs, vit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from reparam_peft import ReparamConfig
from reparam_peft.compression.loading import CompressingLoader
from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.standalone.checkpoint import CheckpointConfig


def config(**options: object) -> ReparamConfig:
    return ReparamConfig(**{"target_modules": "all-linear", "keep": 0.6, "form": "pivot", **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize(
    "make",
    [llama, gpt2, bert, t5, vit, partial(llama, tie_word_embeddings=False)],
    ids=["llama", "gpt2", "bert", "t5", "vit", "embedding"],
)
def test_the_same_model_as_by_compressing_in_memory(
    make: Callable[[], PreTrainedModel], form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    batch: dict[str, torch.Tensor] = token_inputs()
    options: dict[str, object] = {"form": form}
    if make is vit:
        batch = {"pixel_values": torch.rand(2, 3, 16, 16, dtype=dtype)}
        options["target_modules"] = ["projection", "query", "up_proj"]
    elif make is t5:
        batch["decoder_input_ids"] = batch["input_ids"]
    elif isinstance(make, partial):
        options["target_modules"] = ["embed_tokens", "q_proj"]
    dense = make().to(dtype)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    again = type(dense).from_pretrained(tmp_path / "dense", dtype="auto")
    expected = get_peft_model(again, config(**options)).to_standalone()
    loaded, information = type(dense).from_pretrained(
        tmp_path / "dense", quantization_config=config(**options), dtype="auto", output_loading_info=True
    )
    assert not any(information.values())
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert [*loaded.state_dict()] == [*expected.state_dict()]
    assert loaded.config.to_dict()["quantization_config"] == expected.config.to_dict()["quantization_config"]
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected(**batch).logits)
    loaded.save_pretrained(tmp_path / "small")
    expected.save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_one_dense_target_at_a_time(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CompressingLoader.factorize
    counts = []

    def watched(self: CompressingLoader, model: nn.Module, name: str, weight: torch.Tensor) -> FactorizedModule:
        module = build(self, model, name, weight)
        targets = [model.get_submodule(target).weight for target in self.targets]
        counts.append(sum(not target.is_meta and target.numel() > 1 for target in targets))
        return module

    monkeypatch.setattr(CompressingLoader, "factorize", watched)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config())
    assert counts == [0] * 14


def test_the_config_that_was_given_stays_as_it_is(dense: Path) -> None:
    given = config(target_modules=None)
    before = given.to_dict()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=given)
    assert given.to_dict() == before
    assert isinstance(model.config.quantization_config, CheckpointConfig)


def test_it_moves_to_a_device_and_trains(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(), device_map="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 19)
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    before = model.model.layers[0].mlp.up_proj.B.weight.detach().clone()
    Trainer(model.float(), arguments, train_dataset=[{"input_ids": ids, "labels": ids}]).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.B.weight, before.float())


def test_a_model_that_stays_dense_is_a_dense_one(dense: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="All 14 targets stay dense"):
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(keep=1.0, form="factors"))
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again/config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "whitened"}, "needs calibration data"),
        ({"allocation": "loss"}, "needs calibration data"),
        ({"keep_base": True}, "has an effect on adapters only"),
        ({"modules_to_save": ["lm_head"]}, "has an effect on adapters only"),
        ({"target_modules": ["nothing"]}, "match no module"),
        ({"rank_pattern": {"q_proj": 999}}, "q_proj.*999"),
    ],
)
def test_what_cannot_be_honoured_is_refused(dense: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(**options))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_shared_weight_is_refused(name: str, tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: the weight is shared"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(target_modules=[name]))


def test_a_device_map_with_a_disk_is_refused(dense: Path) -> None:
    with pytest.raises(ValueError, match="compress_checkpoint"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(), device_map={"": "disk"}, offload_folder=dense)


def test_a_compressed_checkpoint_is_not_compressed_again(dense: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config()).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="CheckpointConfig but you are passing a ReparamConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", quantization_config=config())


def test_nan_in_a_weight_is_an_error_that_names_it(dense: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError) as caught:
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config())
    assert "model.layers.1.mlp.up_proj" in str(caught.value) + caplog.text
