"""`ReparamModel`: what it targets, at which rank, and that an error leaves the model as it was."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import compress
from support.model_state import assert_untouched
from support.models import ConvNet, bert, convnet, gpt2, llama, on_meta, tied, token_inputs
from support.tolerances import assert_close
from torch import nn

import reparam_peft.tuner.targets
from reparam_peft import ReparamConfig, SizeReport, factorize
from reparam_peft.tuner.layer import ReparamLayer

# Which modules


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


# Which rank


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


def test_matrices_that_factors_would_not_shrink_stay_dense_and_are_reported() -> None:
    small = compress(llama(), target_modules="all-linear", r=24)
    report = small.size_report()
    # k and v are 32 × 64: at rank 24 the factors would hold 2,304 parameters, the matrix holds 2,048.
    assert sorted({name.rsplit(".", 1)[-1] for name in report.dense_modules}) == ["k_proj", "v_proj"]
    assert small.peft_config["default"].dense_modules == report.dense_modules
    assert all(f"dense: {name}" in str(report) for name in report.dense_modules)
    assert type(small.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")) is nn.Linear
    assert report.to_dict()["targets"]["stored_parameters"] == 4 * 2048 + 24 * (4 * 128 + 6 * 224)


def test_dense_modules_survive_a_round_trip(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    small = compress(llama(), target_modules="all-linear", keep=0.5, dense_modules=[name]).eval()
    small.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**token_inputs()).logits, small(**token_inputs()).logits)
    assert loaded.size_report() == small.size_report()
    assert loaded.peft_config["default"].dense_modules == [name]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_stored_parameters_stay_within_keep(keep: float) -> None:
    report = compress(llama(), target_modules="all-linear", keep=keep).size_report()
    assert 0.5 * keep < report.keep <= keep


def test_everything_dense_warns_and_still_saves(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="All 14 targets stay dense"):
        small = compress(llama(), target_modules="all-linear", keep=1.0)
    assert torch.equal(small(**token_inputs()).logits, llama()(**token_inputs()).logits)
    assert small.size_report().keep == 1.0
    small.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="stay dense"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**token_inputs()).logits, small(**token_inputs()).logits)


def test_factors_are_the_truncated_svd() -> None:
    original, small = llama(), compress(llama(), target_modules=["q_proj"], r=9)
    for index in range(2):
        W = original.model.layers[index].self_attn.q_proj.weight.detach()
        A, B = small.model.model.layers[index].self_attn.q_proj.reparam_factors["default"].factors
        assert_close(A @ B, torch.Tensor(factorize(W, 9).A @ factorize(W, 9).B))


# The config


def test_config_of_the_caller_is_not_changed_and_can_be_used_again() -> None:
    config = ReparamConfig(target_modules="all-linear", keep=0.5)
    before = config.to_dict()
    first, second = get_peft_model(llama(), config), get_peft_model(bert(), config)
    assert config.to_dict() == before
    assert first.peft_config["default"].rank_pattern.keys() != second.peft_config["default"].rank_pattern.keys()


def test_config_is_filled_in() -> None:
    config = compress(llama(), target_modules="all-linear", keep=0.5).peft_config["default"]
    assert (config.method, config.allocation, config.form) == ("svd", "uniform", "factors")
    assert config.dense_parameters == 86_016
    assert config.dense_bytes == 4 * 86_016
    assert config.stored_bytes == 4 * config.stored_parameters


def test_inference_mode_config_leaves_no_uninitialised_factors(tmp_path: Path) -> None:
    expected = compress(llama(), target_modules="all-linear", keep=0.5).eval()
    frozen = compress(llama(), target_modules="all-linear", keep=0.5, inference_mode=True)
    assert all(parameter.isfinite().all() for parameter in frozen.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    expected.save_pretrained(tmp_path)
    from_file = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path))
    for small in (frozen, from_file):
        assert torch.equal(small(**token_inputs()).logits, expected(**token_inputs()).logits)
    assert all(parameter.isfinite().all() for parameter in from_file.parameters())
    assert all(m.base_weight_dropped for m in from_file.modules() if isinstance(m, ReparamLayer))


def test_factors_that_never_arrive_are_not_saved_and_not_run(tmp_path: Path) -> None:
    compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path / "good")
    waiting = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path / "good"))
    with pytest.raises(RuntimeError, match=r"q_proj: the factors of adapter 'default' were never loaded"):
        waiting.save_pretrained(tmp_path / "bad")
    with torch.device("meta"):
        skeleton = type(llama())(llama().config)
    on_meta = get_peft_model(skeleton, PeftConfig.from_pretrained(tmp_path / "good"))
    with pytest.raises(RuntimeError, match="the factors of adapter 'default' were never loaded"):
        on_meta.model.model.layers[0].self_attn.q_proj(torch.ones(1, 64))


# Size


def test_size_report_counts_a_kept_base_and_tied_weights_once() -> None:
    for build in (llama, gpt2, bert):
        total = sum(parameter.numel() for parameter in build().parameters())
        for keep_base in (False, True):
            report = compress(build(), keep=0.5, keep_base=keep_base).size_report()
            assert isinstance(report, SizeReport)
            assert report.to_dict()["model"]["dense_parameters"] == total
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default'\], got 'other'"):
        compress(llama()).size_report("other")


# Errors before anything is changed


def spoil(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_the_last_weight_leaves_the_model_as_it_was(value: float) -> None:
    model = spoil(llama(), value)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: `weight` contains NaN or infinite values"):
        compress(model, target_modules="all-linear")
    assert_untouched(model, spoil(llama(), value))
    assert not hasattr(model, "peft_config")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 0.0
    assert compress(model, target_modules="all-linear").size_report().keep < 0.8


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_failure_midway_leaves_the_model_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(weight: torch.Tensor, rank: int) -> Any:
        calls.append(weight)
        if len(calls) == 9:
            raise error("did not converge")
        return factorize(weight, rank)

    monkeypatch.setattr(reparam_peft.tuner.data_free, "factorize", fails)
    model = llama()
    with pytest.raises(error):
        compress(model, target_modules="all-linear")
    assert_untouched(model, llama())


def test_failure_while_adding_an_adapter_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    small = compress(llama(), target_modules="all-linear", keep=0.5, keep_base=True).eval()
    expected, state = small(**token_inputs()).logits, list(small.state_dict())

    def fails(weight: torch.Tensor, rank: int) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(reparam_peft.tuner.data_free, "factorize", fails)
    with pytest.raises(torch.linalg.LinAlgError, match=r"q_proj: did not converge"):
        small.add_adapter("other", ReparamConfig(target_modules="all-linear", keep=0.2, keep_base=True))
    assert list(small.peft_config) == ["default"]
    assert list(small.state_dict()) == state
    assert torch.equal(small(**token_inputs()).logits, expected)


def grouped() -> ConvNet:
    model = convnet()
    model.conv1 = nn.Conv2d(12, 16, 3, groups=4)
    return model


@pytest.mark.parametrize(
    ("build", "options", "error", "match"),
    [
        (grouped, {"target_modules": ["conv0", "conv1"]}, ValueError, r"conv1: `groups` of a Conv2d must be 1, got 4"),
        (llama, {"target_modules": ["norm"]}, TypeError, r"model\.norm: a LlamaRMSNorm cannot be factorised, only Linear"),
        (llama, {"target_modules": ["q_proj", "mlp"]}, TypeError, r"layers\.0\.mlp: a LlamaMLP cannot be factorised"),
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


@pytest.mark.parametrize("name", ["a.b", "train", "half"])
def test_adapter_names_that_torch_cannot_hold_are_refused(name: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match="`adapter_name` must hold no dot and not be the name of a method"):
        get_peft_model(model, ReparamConfig(target_modules=["q_proj"]), adapter_name=name)
    assert_untouched(model, llama())


def test_tied_weights_can_be_factorised_where_the_base_is_kept() -> None:
    small = compress(tied(), target_modules=["lm_head"], keep=0.5, keep_base=True)
    with small.disable_adapter():
        assert torch.equal(small(**token_inputs()).logits, tied()(**token_inputs()).logits)


def test_keep_base_cannot_come_too_late() -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    with pytest.raises(ValueError, match="`keep_base=True` cannot be honoured"):
        small.add_adapter("other", ReparamConfig(target_modules=["q_proj"], keep=0.5, keep_base=True))
    assert list(small.peft_config) == ["default"]


def test_unknown_dense_module_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"`dense_modules` \['nowhere'\] are not targeted"):
        compress(llama(), target_modules=["q_proj"], dense_modules=["nowhere"])


# States that must not go wrong silently


def test_factors_that_are_made_late_are_those_that_the_optimiser_holds(tmp_path: Path) -> None:
    compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    small = get_peft_model(llama(), config)
    held = [parameter for parameter in small.parameters() if parameter.requires_grad]
    small(**token_inputs()).logits.square().mean().backward()
    assert len(held) == 4
    assert all(parameter.grad is not None and parameter.isfinite().all() for parameter in held)


def test_an_adapter_that_is_all_dense_keeps_the_weights_of_the_next_one(tmp_path: Path) -> None:
    expected = llama()(**token_inputs()).logits
    with pytest.warns(UserWarning, match="stay dense"):
        small = compress(llama(), target_modules=["q_proj"], keep=1.0)
    small.add_adapter("smaller", ReparamConfig(target_modules=["q_proj"], keep=0.5))
    small.set_adapter("smaller")
    assert not torch.equal(small(**token_inputs()).logits, expected)
    small.set_adapter("default")
    assert torch.equal(small(**token_inputs()).logits, expected)


def test_adapters_of_another_method_stay_beside_ours() -> None:
    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    model.add_adapter(ReparamConfig(target_modules=["v_proj"], keep=0.5), "small")
    layers = [module for module in model.modules() if isinstance(module, ReparamLayer)]
    assert len(layers) == 2
    assert all(layer.base_weight_dropped for layer in layers)


def test_after_a_failed_load_another_adapter_drops_the_weight(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path / name)
    edit_tensors(lambda t: t[KEY].fill_(torch.nan))(tmp_path / "bad")
    base = llama()
    with pytest.raises(ValueError, match="contains NaN"):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert not hasattr(base, "peft_config")
    loaded = PeftModel.from_pretrained(base, tmp_path / "good", adapter_name="good")
    assert all(layer.base_weight_dropped for layer in loaded.modules() if isinstance(layer, ReparamLayer))


def test_a_checkpoint_with_missing_factors_does_not_resume(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    small.save_pretrained(tmp_path)
    edit_tensors(lambda t: t.pop(KEY))(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint has no such tensor"):
        small.load_adapter(tmp_path, "default", is_trainable=True)


def test_nothing_is_loaded_into_a_merged_adapter(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    small.save_pretrained(tmp_path)
    small.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged; unmerge it"):
        small.load_adapter(tmp_path, "default")


def test_merging_a_shared_weight_is_refused() -> None:
    small = compress(tied(), target_modules=["lm_head"], keep=0.5, keep_base=True)
    expected = small(**token_inputs()).logits
    for merge in (small.merge_adapter, small.merge_and_unload):
        with pytest.raises(ValueError, match=r"the weight is shared .* merging would change the other too"):
            merge()
    assert torch.equal(small(**token_inputs()).logits, expected)


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_checkpoint_of_an_embedding_holds_the_factors_alone(keep_base: bool, merged: bool, tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "lm_head"], "keep": 0.5, "keep_base": keep_base}
    small = compress(llama(), **options).eval()
    expected = small(**token_inputs()).logits
    if merged:
        small.merge_adapter()
    small.save_pretrained(tmp_path)
    assert all("reparam_factors" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**token_inputs()).logits, expected)
    if keep_base:
        with loaded.disable_adapter():
            assert torch.equal(loaded(**token_inputs()).logits, llama()(**token_inputs()).logits)


def test_factors_that_overflow_the_checkpoints_dtype_are_not_saved(tmp_path: Path) -> None:
    small = compress(llama().half(), target_modules=["q_proj"], keep=0.5)
    small.model.model.layers[0].self_attn.q_proj.reparam_factors["default"].A.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"overflows torch\.float16 in which it is saved"):
        small.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


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


def test_layers_whose_weights_torch_reads_itself_are_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    with pytest.raises(ValueError, match=r"0\.linear1: nn\.TransformerEncoderLayer reads the weights of its layers itself"):
        compress(model, target_modules=["linear1", "linear2"])


def test_layers_of_another_method_are_refused() -> None:
    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=r"q_proj: the module is wrapped by another PEFT method already \(peft\.tuners\.lora"):
        model.add_adapter(ReparamConfig(target_modules=["q_proj"], keep=0.5), "reparam")
    assert list(model.peft_config) == ["lora"]
    assert [type(module) for module in model.modules()] == before


def test_size_report_counts_modules_to_save_once() -> None:
    total = sum(parameter.numel() for parameter in bert().parameters())
    report = compress(bert(), target_modules=["query"], r=4, task_type="SEQ_CLS").size_report()
    assert report.to_dict()["model"]["dense_parameters"] == total


def test_push_to_hub_uploads_the_card_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, str] = {}

    def upload(self: Any, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any) -> None:
        uploaded.update({path.name: path.read_text(errors="replace") for path in Path(working_dir).iterdir()})

    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    api = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="me/small"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    own_card = ModelCard("---\ntags: [mine]\n---\n# My words\n")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: own_card)
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    small.peft_config["default"].evaluation = {"perplexity": 25.25}
    small.push_to_hub("me/small")
    assert torch.equal(copy.deepcopy(small)(**token_inputs()).logits, small(**token_inputs()).logits)
    pickle.loads(pickle.dumps(small))
    assert set(uploaded) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for words in (
        "My words",
        "import reparam_peft",
        "| method | svd |",
        "keep = 0.5",
        "| perplexity | 25.25 |",
        "stored parameters",
    ):
        assert words in uploaded["README.md"]


# Damaged checkpoints


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return damage


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.reparam_factors.A.weight"
Q1 = "model.layers.1.self_attn.q_proj"


SEEN_BEFOREHAND = [
    (truncate, "is damaged .*copy or download it again"),
    (huge_header, "is damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "is damaged"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "Expecting"),
    (edit_tensors(lambda t: t.pop(KEY)), r"has no factor A of model\.layers\.1\.self_attn\.q_proj"),
    (
        edit_tensors(lambda t: t.update({KEY: t[KEY][:, :-1].clone()})),
        r"factor A of shape \(64, 15\) .* its config says rank 16",
    ),
    (edit_config(rank_pattern={Q1: 5}), "the two do not belong together"),
    (edit_config(rank_pattern={Q1: -5}), "ranks of at least 1"),
    (edit_config(rank_pattern=[1, 2]), "`rank_pattern` must be a dict"),
    (edit_config(method="magic"), "`method` must be one of"),
    (edit_config(stored_parameters="many"), "`stored_parameters` is filled in"),
]
SEEN_WHILE_LOADING = [
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model|[Rr]epo id"),
    (edit_tensors(lambda t: t[KEY].fill_(torch.nan)), "contains NaN or infinite values; the checkpoint is damaged"),
    (edit_tensors(lambda t: t[KEY][0, 0].fill_(torch.inf)), "contains NaN or infinite values; the checkpoint is damaged"),
    (edit_tensors(lambda t: t.update({KEY: t[KEY][:-1].clone()})), r"q_proj.*: the checkpoint has shape \(63, 16\)"),
]


@pytest.mark.parametrize(("damage", "match"), SEEN_BEFOREHAND + SEEN_WHILE_LOADING)
def test_damaged_checkpoint_raises_and_the_base_loses_nothing(
    damage: Callable[[Path], Any], match: str, tmp_path: Path
) -> None:
    compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad")
    base = llama()
    with pytest.raises((ValueError, TypeError), match=match):
        PeftModel.from_pretrained(base, str(tmp_path / "bad"))
    if any(damage is seen for seen, _ in SEEN_BEFOREHAND):
        assert_untouched(base, llama())
    elif "adapter_model" not in match:  # seen while loading: the modules are put back, but PEFT has frozen them by then
        assert_untouched(base.requires_grad_(), llama())
    else:  # PEFT looks for the file last; what it leaves says so
        with pytest.raises(RuntimeError, match="were never loaded"):
            base(**token_inputs())
    for got, expected in zip(base.model.layers, llama().model.layers, strict=True):
        assert torch.equal(got.self_attn.q_proj.weight, expected.self_attn.q_proj.weight), "the original weight is gone"


def test_damaged_second_adapter_leaves_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path / name)
    edit_tensors(lambda t: t[KEY].fill_(torch.nan))(tmp_path / "second")
    small = PeftModel.from_pretrained(llama(), tmp_path / "first")
    expected, state = small(**token_inputs()).logits, list(small.state_dict())
    with pytest.raises(ValueError, match="contains NaN"):
        small.load_adapter(tmp_path / "second", adapter_name="second")
    assert list(small.peft_config) == ["default"]
    assert list(small.state_dict()) == state
    assert torch.equal(small(**token_inputs()).logits, expected)
    with pytest.raises(ValueError, match="contains NaN"):
        small.load_adapter(tmp_path / "second", adapter_name="default")
    assert torch.equal(small(**token_inputs()).logits, expected)


@pytest.mark.parametrize(
    "damage",
    [
        edit_tensors(lambda t: t[KEY].fill_(torch.nan)),
        edit_tensors(lambda t: t[KEY][0, 0].fill_(torch.nan)),
        edit_tensors(lambda t: t[KEY][0, 0].fill_(torch.inf)),
        edit_tensors(lambda t: t.pop(KEY)),
    ],
    ids=["all NaN", "one NaN", "one inf", "missing"],
)
def test_transformers_load_adapter_of_a_damaged_checkpoint_does_not_pass_silently(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    compress(llama(), target_modules=["q_proj"], keep=0.5).save_pretrained(tmp_path)
    damage(tmp_path)

    def load_and_run() -> None:
        model = llama()
        model.load_adapter(str(tmp_path))
        model(**token_inputs())

    with pytest.raises((ValueError, RuntimeError), match="damaged"):
        load_and_run()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    compress(llama(), target_modules=["up_proj"], keep=0.5).save_pretrained(tmp_path)
    base = llama(intermediate_size=96)
    with pytest.raises(ValueError, match="the checkpoint has shape"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, llama(intermediate_size=96).model.layers[0].mlp.up_proj.weight)
