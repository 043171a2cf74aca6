"""Adapters in their files: what is written, and damaged ones, which leave the base as it was."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.adapters import compress
from support.few_bits import config_in_few_bits
from support.model_state import assert_untouched
from support.models import llama, token_inputs
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reparam_peft.tuner.layer import ReparamLayer


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


def test_values_that_overflow_the_base_model_are_refused_and_the_base_is_as_it_was(tmp_path: Path) -> None:
    compress(llama(), r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("B.weight"))
    tensors[key][0, 0] = 1e5
    save_file(tensors, path, {"format": "pt"})
    base = llama().half()
    with pytest.raises(ValueError, match=r"B\.weight: the values in the checkpoint overflow torch\.float16"):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert_untouched(base, llama().half())
    assert PeftModel.from_pretrained(llama(), str(tmp_path))


# What has no place, and what is not whole


def one_layer() -> LlamaForCausalLM:
    return llama(num_hidden_layers=1)


def narrow_config(folder: Path) -> None:
    edit_config(folder, target_modules=["up_proj"])


def short_rank_pattern(folder: Path) -> None:
    ranks = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    kept = {name: rank for name, rank in ranks.items() if "layers.1" not in name}
    edit_config(folder, rank_pattern=kept, target_modules=r".*layers\.0.*(q|up)_proj")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LOADERS = {
    "PeftModel": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "is_trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "transformers": lambda base, folder: base.load_adapter(str(folder)),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize(
    ("base", "edit", "match"),
    [
        (one_layer, None, "has factors for 2 modules that the model does not have"),
        (llama, narrow_config, "has factors for 2 modules .* that `target_modules` of its adapter_config.json does not name"),
    ],
    ids=["another depth", "target_modules"],
)
def test_factors_without_a_place_are_refused_on_every_route(
    base: Callable[[], LlamaForCausalLM],
    edit: Callable[[Path], None] | None,
    match: str,
    load: Callable[[LlamaForCausalLM, Path], object],
    tmp_path: Path,
) -> None:
    compress(llama(), target_modules=["q_proj", "up_proj"], keep=0.5).save_pretrained(tmp_path)
    if edit is not None:
        edit(tmp_path)
    model = base()
    with pytest.raises(ValueError, match=match):
        load(model, tmp_path)
    assert_untouched(model, base())


def test_factors_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    compress(llama(), target_modules=["q_proj", "up_proj"], keep=0.5).save_pretrained(tmp_path)
    short_rank_pattern(tmp_path)
    with pytest.raises(ValueError, match=r"has factors of model.layers.1.*, which its config does not have"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_state_dict_of_more_modules_is_refused() -> None:
    state = get_peft_model_state_dict(compress(llama(), target_modules=["q_proj", "up_proj"], keep=0.5))
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    expected = small(**token_inputs()).logits
    with pytest.raises(ValueError, match=r"up_proj.reparam_factors.*: the model has no place for this factor"):
        set_peft_model_state_dict(small, state)
    assert torch.equal(small(**token_inputs()).logits, expected)


def emptied(key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.new_empty(0)


def half_of_it(key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.flatten()[: tensor.numel() // 2]


def without_masks(key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if key.endswith(".mask") else tensor


@pytest.mark.parametrize("shard", [emptied, half_of_it, without_masks])
def test_sharded_factors_are_not_saved(shard: Callable[[str, torch.Tensor], torch.Tensor | None], tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5, form="pivot")
    sharded = {key: shard(key, tensor) for key, tensor in small.state_dict().items()}
    state = {key: tensor for key, tensor in sharded.items() if tensor is not None}
    with pytest.raises(
        ValueError, match=r"q_proj.reparam_factors.default.*the tensor .*(has shape|is missing).*Gather the whole"
    ):
        small.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_heads_that_are_empty_are_not_saved(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5, modules_to_save=["lm_head"])
    state = {key: tensor.new_empty(0) if "modules_to_save" in key else tensor for key, tensor in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head.modules_to_save.default.weight: the tensor is empty"):
        small.save_pretrained(tmp_path, state_dict=state)


def test_a_whole_state_dict_is_saved_as_the_model_is_and_other_processes_give_none(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5, form="pivot")
    small.save_pretrained(tmp_path / "model")
    small.save_pretrained(tmp_path / "state", state_dict=small.state_dict())
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("model", "state")]
    assert files[0] == files[1]
    small.save_pretrained(tmp_path / "other", state_dict={}, is_main_process=False)
    assert not (tmp_path / "other" / "adapter_model.safetensors").exists()


def test_a_model_that_checkpoints_activations_is_saved(tmp_path: Path) -> None:
    small = compress(llama(), target_modules=["q_proj"], keep=0.5)
    expected = small(**token_inputs()).logits
    apply_activation_checkpointing(small, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    small.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(**token_inputs()).logits, expected)


@pytest.fixture(scope="module")
def in_few_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few_bits")
    get_peft_model(made := llama(), config_in_few_bits(made)).save_pretrained(folder)
    return folder


DENSE, CORRECTED = (f"base_model.model.model.layers.0.self_attn.{name}_proj.reparam_factors" for name in "vo")  # in 4 bits
IN_EIGHT = "base_model.model.model.layers.0.self_attn.q_proj.reparam_factors"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(f"{CORRECTED}.Q.weight"), r"has no factor Q of model.layers.0.self_attn.o_proj \(Q.weight\)"),
        (lambda t: t.pop(f"{DENSE}.B.weight_absmax"), "v_proj.*weight_absmax: the checkpoint has no such tensor"),
        (lambda t: t[f"{DENSE}.B.weight_absmax"][0].fill_(torch.nan), "weight_absmax: the checkpoint contains NaN"),
        (lambda t: t[f"{DENSE}.B.weight_absmax"][0].fill_(-1), "v_proj.*B: `weight_absmax` holds scales that are negative"),
        (lambda t: t[f"{IN_EIGHT}.B.weight_scale"][0].fill_(-1), "q_proj.*B: `weight_scale` holds scales that are negative"),
        (lambda t: t.update({f"{DENSE}.B.weight": t[f"{DENSE}.B.weight"].char()}), "v_proj.*: the checkpoint has shape .*int8"),
        (lambda t: t.update({f"{DENSE}.B.weight": t[f"{CORRECTED}.Q.weight"].clone()}), "v_proj.*: the checkpoint has shape"),
        (
            lambda t: t.update({f"{DENSE}.B.weight": t[f"{DENSE}.B.weight_absmax"].clone()}),
            "v_proj.*: the checkpoint has shape",
        ),
    ],
)
def test_damaged_numbers_in_few_bits_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], Any], match: str, in_few_bits: Path, tmp_path: Path
) -> None:
    shutil.copytree(in_few_bits, tmp_path / "bad")
    edit_tensors(edit)(tmp_path / "bad")
    base = llama()
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert not hasattr(base, "peft_config")


def test_an_adapter_in_few_bits_has_the_size_that_is_told_and_its_scales_stay_whole(tmp_path: Path) -> None:
    made = llama().to(torch.bfloat16)
    small = get_peft_model(made, config_in_few_bits(made))
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == small.peft_config["default"].stored_bytes
    scales = [tensor.dtype for name, tensor in tensors.items() if name.endswith(("_absmax", "_scale"))]
    assert {*scales} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if n.endswith("weight")} == {torch.int8, torch.uint8, torch.bfloat16}
    resumed = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path, is_trainable=True)
    assert torch.equal(resumed.eval()(**token_inputs()).logits, small.eval()(**token_inputs()).logits)


def test_numbers_in_few_bits_that_were_never_loaded_do_not_look_like_weights(in_few_bits: Path, tmp_path: Path) -> None:
    shutil.copytree(in_few_bits, tmp_path / "bad")
    edit_tensors(lambda t: t.pop(f"{DENSE}.B.weight_absmax"))(tmp_path / "bad")
    base = llama()
    base.load_adapter(str(tmp_path / "bad"))
    with pytest.raises(RuntimeError, match="were never loaded"):
        base(**token_inputs())
