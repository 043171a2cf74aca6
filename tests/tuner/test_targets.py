"""Which modules are targets, at which rank, and which are refused before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import compress
from support.model_state import assert_untouched
from support.models import ConvNet, bert, convnet, gpt2, llama, on_meta, tied, token_inputs
from torch import Tensor, nn

from reparam_peft import ReparamConfig
from reparam_peft.tuner.layer import ReparamLayer


def test_an_adapter_of_corrected_matrices_leaves_some_dense_and_is_loaded(tmp_path: Path) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", form="corrected", r=24))
    config = model.peft_config["default"]
    assert len(config.dense_modules) == 8, "of which numbers in few bits and a correction of this rank would save nothing"
    assert len(config.bit_pattern) == 6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].dense_modules == config.dense_modules
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**token_inputs()).logits, model.eval()(**token_inputs()).logits)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: t.half() if "absmax" in k else t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"`weight_absmax` holds scales in torch.float16, and they are float32"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_matrix_as_it_is_has_its_full_rank() -> None:
    name, base = "model.layers.0.self_attn.q_proj", llama()
    patterns = {"rank_pattern": {name: 3}, "form_pattern": {name: "dense"}, "bit_pattern": {name: 8}}
    with pytest.raises(ValueError, match="its form is 'dense', of which the rank is 64, and `rank_pattern` says 3"):
        get_peft_model(base, ReparamConfig(target_modules=["q_proj"], **patterns))


def test_default_targets_are_the_projections_of_the_blocks() -> None:
    names = compress(llama()).targeted_module_names
    assert {name.rsplit(".", 1)[-1] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(names) == 14
    assert len(compress(gpt2()).targeted_module_names) == 8
    assert not any("pooler" in name or "classifier" in name for name in compress(bert()).targeted_module_names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*layers\.1\..*(q|k)_proj"}, 2),
        ({"target_modules": ["q_proj", "up_proj"]}, 4),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"}, 7),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 1),
    ],
)
def test_target_selection(options: dict[str, Any], expected: int) -> None:
    small = compress(llama(), keep=0.5, **options)
    assert len(small.peft_config["default"].rank_pattern) == expected
    assert sum(isinstance(m, ReparamLayer) for m in small.modules()) == expected


def test_unknown_architecture_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        compress(convnet())


def test_ranks_follow_pattern_then_r_then_keep() -> None:
    small = compress(
        llama(),
        target_modules="all-linear",
        r=8,
        rank_pattern={"model.layers.0.self_attn.q_proj": 3, "v_proj": 5, r"1\..*\.k_proj": 7},
    )
    ranks = small.peft_config["default"].rank_pattern
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    assert ranks["model.layers.1.self_attn.q_proj"] == 8
    assert ranks["model.layers.1.self_attn.v_proj"] == 5
    assert (ranks["model.layers.0.self_attn.k_proj"], ranks["model.layers.1.self_attn.k_proj"]) == (8, 7)


def test_a_rank_for_no_target_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="`rank_pattern` holds 'k_projection', which none of the 4 targeted modules"):
        compress(model, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4, "k_projection": 4})
    assert_untouched(model, llama())


class Named(nn.Module):
    """Two linear layers, of which one has a name that is no regular expression."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.m = nn.ModuleDict({"a(b": nn.Linear(16, 16), "x/0": nn.Linear(16, 16), "x": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.m.values():
            x = layer(x)
        return x


def test_names_of_modules_are_names_and_no_patterns(tmp_path: Path) -> None:
    small = compress(Named(), target_modules=r"m\..*", keep=0.5)
    small.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(PeftModel.from_pretrained(Named(), tmp_path)(x), small(x))
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == ["m.a(b", "m.x", "m.x/0"]


@pytest.mark.parametrize("field", ["rank_pattern", "target_modules", "exclude_modules", "no stored_parameters"])
def test_patterns_of_a_file_are_not_tried_on_names(field: str, tmp_path: Path) -> None:
    """`([a-z0-9_.]+)+!` takes hours on any name of a module."""
    compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path)
    path, evil = tmp_path / "adapter_config.json", "([a-z0-9_.]+)+!"
    fields = json.loads(path.read_text())
    if field == "rank_pattern":
        fields["rank_pattern"] = {evil: 4, **fields["rank_pattern"]}
    elif field == "no stored_parameters":
        fields |= {"target_modules": evil, "stored_parameters": None}
    else:
        fields[field] = evil
    path.write_text(json.dumps(fields))
    if field in ("target_modules", "exclude_modules"):  # the names are in `rank_pattern`
        assert PeftModel.from_pretrained(llama(), tmp_path).size_report().matrices
    else:
        for route in (PeftModel.from_pretrained, with_config):
            with pytest.raises(
                ValueError,
                match=r"adapter_config\.json|adapter_model\.safetensors|`rank_pattern` holds|has factors for 1 modules",
            ):
                route(llama(), tmp_path)


def with_config(model: nn.Module, folder: Path) -> PeftModel:
    """As PEFT's auto classes load."""
    return PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder))


def depthwise() -> ConvNet:
    model = convnet()
    model.conv1 = nn.Conv2d(12, 12, 3, groups=12)
    return model


@pytest.mark.parametrize(
    ("build", "options", "error", "match"),
    [
        (
            depthwise,
            {"target_modules": ["conv0", "conv1"]},
            ValueError,
            r"conv1: `groups` of a Conv2d must be fewer than its 12 input",
        ),
        (llama, {"target_modules": ["norm"]}, TypeError, r"model\.norm: a LlamaRMSNorm cannot be factorised, only Linear"),
        (
            llama,
            {"target_modules": ["q_proj", "mlp"]},
            TypeError,
            r"layers\.1\.mlp: a LlamaMLP cannot be factorised",
        ),
        (
            tied,
            {"target_modules": ["lm_head"]},
            ValueError,
            r"lm_head: the weight is shared \(.*embed_tokens.*\).*untie it first",
        ),
        (tied, {"target_modules": ["embed_tokens"]}, ValueError, r"embed_tokens: the weight is shared"),
        (llama, {"target_modules": ["nothing"]}, ValueError, r"Target modules {'nothing'} not found"),
        (llama, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 65}}, ValueError, r"`rank` must be in \[1, 64\].*65"),
        (on_meta, {"target_modules": ["q_proj"]}, ValueError, r"q_proj: the weight is on the meta device"),
    ],
)
def test_bad_targets_raise_before_anything_is_changed(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = build()
    with pytest.raises(error, match=match):
        compress(model, **options)
    if build is not on_meta:
        assert_untouched(model, build())
    else:
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_tied_weights_can_be_factorised_where_the_base_is_kept() -> None:
    small = compress(tied(), target_modules=["lm_head"], keep=0.5, keep_base=True)
    with small.disable_adapter():
        assert torch.equal(small(**token_inputs()).logits, tied()(**token_inputs()).logits)


def test_unknown_dense_module_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"`dense_modules` \['nowhere'\] are not targeted"):
        compress(llama(), target_modules=["q_proj"], dense_modules=["nowhere"])


def test_a_patched_forward_is_refused_and_hooks_are_told_of() -> None:
    model = llama()
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.warns(UserWarning, match=r"forward hooks of model\.layers\.0\.self_attn\.q_proj do not run"):
        compress(model, target_modules=["q_proj"], keep=0.5)
    model = llama()
    projection = model.model.layers[0].self_attn.q_proj
    projection.forward = lambda x: 3 * nn.Linear.forward(projection, x)
    with pytest.raises(TypeError, match="a Linear computes differently from Linear"):
        compress(model, target_modules=["q_proj"], keep=0.5)


def test_layers_of_another_method_are_refused() -> None:
    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=r"q_proj: the module is wrapped by another PEFT method already \(peft\.tuners\.lora"):
        model.add_adapter(ReparamConfig(target_modules=["q_proj"], keep=0.5), "reparam")
    assert list(model.peft_config) == ["lora"]
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["mlp", "layers", "0", "model", "q_proj", "weight", "A", "mask", "base_layer", "lm_head"])
@pytest.mark.parametrize("first", [False, True])
def test_an_adapter_is_not_named_as_a_part_of_a_name(first: bool, name: str) -> None:
    config = ReparamConfig(target_modules=["q_proj", "up_proj"], r=8)
    model = llama() if first else get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="`adapter_name` must not be a part of the name of a module"):
        get_peft_model(model, config, adapter_name=name) if first else model.add_adapter(name, config)
    if first:
        assert_untouched(model, llama())
    else:
        assert list(model.peft_config) == ["default"]


def test_adapters_with_names_that_are_within_names_are_saved_whole(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=["q_proj", "up_proj"], r=8)
    model = get_peft_model(llama(), config, adapter_name="q")
    for name in ("proj", "layer", "lp", "Q_proj"):
        model.add_adapter(name, model.peft_config["q"])
    expected = model(**token_inputs()).logits
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / name)(**token_inputs()).logits, expected)
