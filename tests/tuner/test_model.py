"""`ReparamModel`: what it fills in, what it refuses, and states that must not go wrong silently."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from support.adapters import compress
from support.model_state import assert_untouched, state_of
from support.models import bert, llama, tied, token_inputs
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.tuner.layer import ReparamLayer

# Which rank


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


def test_everything_dense_warns_and_still_saves(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="All 14 targets stay dense"):
        small = compress(llama(), target_modules="all-linear", keep=1.0)
    assert torch.equal(small(**token_inputs()).logits, llama()(**token_inputs()).logits)
    assert small.size_report().keep == 1.0
    small.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="stay dense"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**token_inputs()).logits, small(**token_inputs()).logits)


# The config


def test_config_of_the_caller_is_not_changed_and_can_be_used_again() -> None:
    config = ReparamConfig(target_modules="all-linear", keep=0.5)
    before = config.to_dict()
    first, second = get_peft_model(llama(), config), get_peft_model(bert(), config)
    after = config.to_dict()
    assert {**after, "base_model_name_or_path": None} == before, "but for the path, which PEFT 0.20 notes"
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


# Errors before anything is changed


@pytest.mark.parametrize("name", ["a.b", "train", "half"])
def test_adapter_names_that_torch_cannot_hold_are_refused(name: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match="`adapter_name` must hold no dot and not be the name of a method"):
        get_peft_model(model, ReparamConfig(target_modules=["q_proj"]), adapter_name=name)
    assert_untouched(model, llama())


def test_keep_base_cannot_come_too_late() -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    with pytest.raises(ValueError, match="`keep_base=True` cannot be honoured"):
        small.add_adapter("other", ReparamConfig(target_modules=["q_proj"], keep=0.5, keep_base=True))
    assert list(small.peft_config) == ["default"]


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


def test_merging_a_shared_weight_is_refused() -> None:
    small = compress(tied(), target_modules=["lm_head"], keep=0.5, keep_base=True)
    expected = small(**token_inputs()).logits
    for merge in (small.merge_adapter, small.merge_and_unload):
        with pytest.raises(ValueError, match=r"the weight is shared .* merging would change the other too"):
            merge()
    assert torch.equal(small(**token_inputs()).logits, expected)


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


# Errors on the way


def modules_of(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


OPERATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object], str]] = {
    "inject": (llama, lambda m: get_peft_model(m, ReparamConfig(r=4)), "ReparamLayer.update_layer"),
    "cast": (lambda: llama().half(), lambda m: get_peft_model(m, ReparamConfig(r=4)), "model.BaseTuner._cast_adapter_dtype"),
    "add": (
        lambda: compress(llama(), r=4),
        lambda m: m.add_adapter("second", ReparamConfig(r=3)),
        "ReparamLayer.update_layer",
    ),
    "merge": (lambda: compress(llama(), r=4), lambda m: m.merge_adapter(), "ReparamLayer.merge"),
    "merge and unload": (lambda: compress(llama(), r=4), lambda m: m.merge_and_unload(), "ReparamLayer.merge"),
    "unmerge": (lambda: merged(keep_base=True), lambda m: m.unmerge_adapter(), "ReparamLayer.unmerge"),
    "delete": (
        lambda: compress(llama(), r=4, keep_base=True),
        lambda m: m.delete_adapter("default"),
        "ReparamLayer.delete_adapter",
    ),
}


def merged(**options: Any) -> PeftModel:
    model = compress(llama(), r=4, **options)
    model.merge_adapter()
    return model


@pytest.mark.parametrize(("make", "operate", "place"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_error_on_the_way_undoes_what_was_done(
    make: Callable[[], nn.Module],
    operate: Callable[[Any], object],
    place: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = make(), []
    expected = model(**token_inputs()).logits
    before = modules_of(model), state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full_place = f"reparam_peft.tuner.{place if place.startswith('model.') else f'layer.{place}'}"
    module = full_place.partition(".BaseTuner" if "cast" in place else ".ReparamLayer")[0]
    own = resolve_name(f"{module}:{full_place.removeprefix(f'{module}.')}")

    def fails(*args: Any, **options: Any) -> Any:
        result = own(*args, **options)
        calls.append(result)
        if len(calls) == (1 if "cast" in place else 4):
            raise error("injected")
        return result

    monkeypatch.setattr(full_place, fails)
    with pytest.raises(error, match="injected"):
        operate(model)
    assert (modules_of(model), state_of(model)) == before[:2]
    assert model.state_dict().keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert list(getattr(model, "peft_config", {})) == (["default"] if isinstance(model, PeftModel) else [])
    monkeypatch.undo()
    torch.testing.assert_close(model(**token_inputs()).logits, expected)
    operate(model)


def test_nothing_is_kept_of_what_was_dropped() -> None:
    base = llama()
    weight = weakref.ref(base.model.layers[0].mlp.up_proj.weight)
    small = get_peft_model(base, ReparamConfig(r=4))
    assert small.base_model._before_injection is None
    assert weight() is None


@pytest.mark.parametrize("safe", [False, True])
def test_a_product_that_overflows_half_precision_is_not_merged(safe: bool) -> None:
    model = compress(llama().half(), r=4, target_modules=["up_proj"])
    factors = model.base_model.model.model.layers[1].mlp.up_proj.reparam_factors["default"]
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.fill_(300.0)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: NaNs .* overflows torch\.float16"):
        model.merge_and_unload(safe_merge=safe)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, ReparamLayer))


def test_bases_whose_hooks_are_gone_are_taken_and_offloaded_ones_refused(tmp_path: Path) -> None:
    compress(llama(), r=4).save_pretrained(tmp_path)
    base = llama()
    expected = compress(llama(), r=4)(**token_inputs()).logits
    cpu_offload(base, execution_device=torch.device("cpu"))
    for load in (lambda: compress(base, r=4), lambda: PeftModel.from_pretrained(base, str(tmp_path))):
        with pytest.raises(ValueError, match="accelerate moves the weight of this layer"):
            load()
    remove_hook_from_submodules(base)
    torch.testing.assert_close(compress(base, r=4)(**token_inputs()).logits, expected)


def test_an_adapter_can_be_offloaded_with_its_buffers() -> None:
    model = compress(llama(), r=4, form="pivot").eval()
    with torch.no_grad():
        expected = model(**token_inputs()).logits
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert torch.equal(model(**token_inputs()).logits, expected)
