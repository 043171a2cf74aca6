"""`ReparamConfig`: what it accepts and writes, and when it says that weights are about to be loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from peft import PeftConfig, PeftType, get_peft_config
from safetensors.torch import save_file
from support.strategies import PRODUCTS, PROPERTY, configs

from reparam_peft import ReparamConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": "full"},
        {"r": 1},
        {"keep": 1},
        {"keep": 1e-9},
        {"method": "svd", "allocation": "uniform", "form": "factors"},
        {"target_modules": ("q", "k"), "exclude_modules": {"lm_head"}},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(0|1)\..*"},
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_to_transform": (0, 2), "layers_pattern": ["h", "layers"]},
        {"rank_pattern": {r"layers\.\d+\.q": 4}, "dense_modules": ["a"], "modules_to_save": ["head"]},
        {"evaluation": {"perplexity": 20, "accuracy": 0.5}},
        {"method": "whitened", "allocation": "loss", "form": "pivot"},
        {"method": "autoencoder", "input_metric": "gram", "output_metric": "none", "shrinkage": 0, "output_shrinkage": 1},
        {"rank_multiple": 1, "floor": 0.8, "ceiling": 0.8},
        {"r": 8, "method": "whitened", "input_metric": "diagonal", "form": "pivot"},
        {"moved_bias": True, "calibration_tokens": 0, "gradient_tokens": 9, "seed": 0, "predicted_loss": 1},
        {"floor": 0.9, "keep": 0.5, "stored_parameters": 5},
        {"floor": 0.5, "keep": 0.4, "rank_pattern": {"embed": 8}},
        {"shrinkage": 0.1, "input_metric": "none", "allocation": "uniform"},
    ],
    ids=str,
)
def test_accepts(options: dict[str, Any]) -> None:
    config = ReparamConfig(**options)
    assert config.peft_type == PeftType.REPARAM
    for name, value in options.items():
        kept = getattr(config, name)
        assert (sorted(kept) == sorted(value)) if isinstance(kept, set) else kept == value


def test_lists_of_modules_become_sets_as_in_peft() -> None:
    config = ReparamConfig(target_modules=["q", "k", "q"], exclude_modules=("head",))
    assert config.target_modules == {"q", "k"}
    assert config.exclude_modules == {"head"}


@PROPERTY
@given(configs())
def test_json_round_trip(config: ReparamConfig) -> None:
    if config.stored_parameters is None:  # a file holds no patterns
        patterns = {name: None for name in ("target_modules", "exclude_modules") if isinstance(getattr(config, name), str)}
        config = dataclasses.replace(config, **patterns)
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert [path.name for path in Path(folder).iterdir()] == ["adapter_config.json"], "a model card without a model"
        for loaded in (ReparamConfig.from_pretrained(folder), PeftConfig.from_pretrained(folder)):
            assert type(loaded) is ReparamConfig
            assert loaded == config
            assert loaded.to_dict() == config.to_dict()
        written = Path(folder, "adapter_config.json").read_bytes()
        loaded.save_pretrained(folder)
        assert Path(folder, "adapter_config.json").read_bytes() == written
    assert get_peft_config(config.to_dict()) == config


@PROPERTY
@given(configs())
def test_to_dict_is_plain_json_in_a_fixed_order(config: ReparamConfig) -> None:
    as_dict = config.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert set(as_dict) == {field.name for field in dataclasses.fields(config)}
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, set):  # whose own order differs from process to process
            assert as_dict[name] == sorted(value)


def test_a_damaged_file_is_refused_as_a_bad_argument_is(tmp_path: Path) -> None:
    ReparamConfig(rank_pattern={"q": 4}, dense_parameters=10, stored_parameters=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    for key, value, error in (
        ("rank_pattern", {"q": 0}, ValueError),
        ("keep", "much", TypeError),
        ("form", "cube", ValueError),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(error, match=f"`{key}`"):
            ReparamConfig.from_pretrained(tmp_path)
        ReparamConfig().save_pretrained(tmp_path)


@pytest.mark.parametrize("form", PRODUCTS)
def test_weights_beside_the_config_are_looked_at(form: str, tmp_path: Path) -> None:
    prefix = "base_model.model.layer.q.reparam_factors"
    expansion = {
        "factors": {"A.weight": torch.zeros(6, 4)},
        "pivot": {"A.mask": torch.zeros(1, dtype=torch.uint8), "A.K.weight": torch.zeros(2, 4)},
    }[form]
    tensors = {f"{prefix}.{key}": tensor for key, tensor in {**expansion, "B.weight": torch.zeros(4, 5)}.items()}
    path = tmp_path / "adapter_model.safetensors"

    def load(rank: int = 4) -> ReparamConfig:
        ReparamConfig(rank_pattern={"layer.q": rank}, stored_parameters=44, form=form).save_pretrained(tmp_path)
        return ReparamConfig.from_pretrained(str(tmp_path))

    save_file(tensors, path)
    assert load().rank_pattern == {"layer.q": 4}
    with pytest.raises(ValueError, match=r"has a factor A of shape \(\d, 4\) for layer.q, and its config says rank 3"):
        load(rank=3)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load()
    save_file({**tensors, f"{prefix.replace('.q.', '.k.')}.B.weight": torch.zeros(4, 5)}, path)
    with pytest.raises(ValueError, match=r"has factors of layer\.k, which its config does not have"):
        load()
    save_file(tensors, path)
    ReparamConfig(rank_pattern={"layer.q": 4}, form=form).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json has no `stored_parameters`"):
        ReparamConfig.from_pretrained(str(tmp_path))
    for missing in ("A.weight" if form == "factors" else "A.mask", "B.weight"):
        save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(f".{missing}")}, path)
        message = rf"has no factor {missing[0]} of layer.q \({missing}\); it is damaged or of another model"
        with pytest.raises(ValueError, match=message):
            load()


def test_the_pivot_form_of_all_rows_has_no_coefficients(tmp_path: Path) -> None:
    prefix = "base_model.model.layer.q.reparam_factors"
    tensors = {f"{prefix}.A.mask": torch.full((1,), 15, dtype=torch.uint8), f"{prefix}.B.weight": torch.zeros(4, 5)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    ReparamConfig(rank_pattern={"layer.q": 4}, stored_parameters=21, form="pivot").save_pretrained(tmp_path)
    assert ReparamConfig.from_pretrained(str(tmp_path)).rank_pattern == {"layer.q": 4}


@pytest.mark.parametrize("form", PRODUCTS)
def test_weights_of_what_has_lost_neurons_are_looked_at(form: str, tmp_path: Path) -> None:
    prefix = "base_model.model.up.reparam_factors"
    expansion = {"factors": {"A.weight": (6, 3)}, "pivot": {"A.mask": (1,), "A.K.weight": (3, 3)}}[form]
    shapes = {"B.weight": (3, 9), **expansion, "kept_rows": (2,)}

    def load(rank: int, size: list[int], **changed: tuple[int, ...]) -> None:
        tensors = {f"{prefix}.{key}": torch.zeros(shape) for key, shape in {**shapes, **changed}.items() if shape}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        fields = {"rank_pattern": {"up": rank}, "sizes": {"up": size}, "stored_parameters": 44, "form": form}
        ReparamConfig(**fields).save_pretrained(tmp_path)
        assert ReparamConfig.from_pretrained(str(tmp_path)).sizes == {"up": size}

    load(3, [6, 9])
    none = dict.fromkeys(expansion, ())
    load(6, [6, 9], **{"B.weight": (6, 9), **none})
    with pytest.raises(ValueError, match=r"has a factor (A )?of shape \(\d, \d\) for up, .* the two do not belong together"):
        load(6, [6, 9])
    for size in ([7, 9], [6, 10]):
        with pytest.raises(ValueError, match=r"has a factor of shape \(\d, \d\) for up, where its config says \(\d, \d+\)"):
            load(3, size)
    with pytest.raises(ValueError, match=r"has a factor of shape \(5, 9\) for up, where its config says \(6, 9\)"):
        load(6, [6, 9], **{"B.weight": (5, 9), **none})


# Resolved (out of a checkpoint) | made with inference_mode | inference_mode afterwards | loading
LOADING = [
    (False, False, False, False),  # new
    (False, True, True, False),  # the user asks for frozen factors of a new decomposition
    (False, False, True, True),  # PeftModel.from_pretrained(config=new) switches it on
    (False, True, False, False),  # a frozen new one that is unfrozen
    (True, True, True, True),  # PeftModel.from_pretrained
    (True, True, False, True),  # ... with is_trainable=True
    (True, False, False, False),  # the config of a live model, given to get_peft_model again
    (True, False, True, True),  # the config of a live model, given to PeftModel.from_pretrained
]


@pytest.mark.parametrize(("resolved", "made_for_inference", "inference_mode", "loading"), LOADING)
def test_loading(resolved: bool, made_for_inference: bool, inference_mode: bool, loading: bool) -> None:
    config = ReparamConfig(stored_parameters=0 if resolved else None, inference_mode=made_for_inference)
    config.inference_mode = inference_mode
    assert config.loading is loading
    assert copy.deepcopy(config).loading is loading


def test_a_config_read_from_a_checkpoint_is_loading_also_when_it_is_made_trainable(tmp_path: Path) -> None:
    config = ReparamConfig(r=4, rank_pattern={"q": 4}, stored_parameters=80, inference_mode=True)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode = False
    assert loaded.loading
    ReparamConfig(r=4).save_pretrained(tmp_path)
    assert not PeftConfig.from_pretrained(tmp_path).loading, "a recipe without weights"


RANKS = {"layers.0.q_proj": 1, "q_proj": 2, r"layers\.[12]\.k_proj": 3, "v|o": 4, r"mlp\..*": 5, "head": 6}


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("layers.0.q_proj", 1),  # exact
        ("model.layers.0.q_proj", 1),  # the first pattern that matches the end
        ("layers.1.q_proj", 2),
        ("q_proj", 2),
        ("model.layers.1.k_proj", 3),
        ("layers.2.k_proj", 3),
        ("layers.3.k_proj", None),
        ("layersX1.k_proj", None),
        ("block.v", 4),  # an alternative is anchored at both ends
        ("block.o", 4),
        ("block.v_proj", None),
        ("block.to", None),
        ("layers.0.mlp.up", 5),
        ("head", 6),
        ("overhead", None),  # a name ends at a dot
        ("model.head", 6),
        ("head.0", None),
        ("my_q_proj", None),
    ],
)
def test_module_rank(name: str, rank: int | None) -> None:
    assert ReparamConfig(rank_pattern=RANKS).module_rank(name) == rank


def test_an_exact_name_comes_before_an_earlier_pattern() -> None:
    config = ReparamConfig(rank_pattern={".*": 1, "a.b": 2, "b": 3})
    assert [config.module_rank(name) for name in ("a.b", "b", "c.b")] == [2, 3, 1]
    # A dot in an exact name is a dot; in a pattern it is any character.
    assert ReparamConfig(rank_pattern={"a.b": 2}).module_rank("aXb") == 2


def test_a_name_that_is_no_regular_expression_is_a_name() -> None:
    config = ReparamConfig(rank_pattern={"a(b": 2, "m.c[0]": 3})
    assert [config.module_rank(name) for name in ("a(b", "m.c[0]", "m.a(b", "other")] == [2, 3, None, None]


def test_of_a_model_that_was_resolved_names_are_names() -> None:
    config = ReparamConfig(rank_pattern={"a.b": 2, "x|y": 3}, stored_parameters=10)
    assert [config.module_rank(name) for name in ("a.b", "c.a.b", "aXb", "x", "x|y")] == [2, None, None, None, 3]


def test_a_rank_for_no_target_is_told() -> None:
    targets = ["layers.0.q_proj", "layers.0.v_proj"]
    ReparamConfig(rank_pattern={"layers.0.q_proj": 4, "v_.*": 4}).check_ranks_used(targets)
    for key in ("k_projection", "^q_proj", "v_proj(", "layers"):
        with pytest.raises(ValueError, match=re.escape(f"`rank_pattern` holds {key!r}, which none of the 2 targeted")):
            ReparamConfig(rank_pattern={"q_proj": 4, key: 4}).check_ranks_used(targets)
    with pytest.raises(ValueError, match="'q_proj'"):
        ReparamConfig(rank_pattern={"q_proj": 4}, stored_parameters=10).check_ranks_used(targets)


PATTERNS = [
    {"target_modules": "([a-z.]+)+!"},
    {"target_modules": ["a"], "exclude_modules": "([a-z.]+)+!"},
    {"target_modules": ["a"], "layers_to_transform": [0], "layers_pattern": "([a-z]+)+!"},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=lambda patterns: max(patterns))
def test_a_file_holds_names_and_no_patterns(patterns: dict[str, Any], tmp_path: Path) -> None:
    config = ReparamConfig(**patterns, rank_pattern={"m.a": 2}, dense_modules=["m.b(c"])
    config.stored_parameters = 10  # as a model does
    config.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["m.a", "m.b(c"]
    assert (written["exclude_modules"], written["layers_to_transform"], written["layers_pattern"]) == (None, None, None)
    assert config.target_modules == ReparamConfig(**patterns).target_modules, "the model's own config is as it was"
    hostile = {**written, **patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(hostile))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.target_modules == {"m.a", "m.b(c"}
    assert (loaded.exclude_modules, loaded.layers_to_transform, loaded.layers_pattern) == (None, None, None)


@pytest.mark.parametrize("patterns", [*PATTERNS, {"rank_pattern": {"([a-z.]+)+!": 4}}], ids=lambda patterns: max(patterns))
def test_a_recipe_in_a_file_holds_no_patterns_either(patterns: dict[str, Any], tmp_path: Path) -> None:
    ReparamConfig(**patterns).save_pretrained(str(tmp_path))
    for read in (PeftConfig.from_pretrained, ReparamConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"adapter_config\.json: `.*` of a file must hold names"):
            read(tmp_path)
    names = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}}
    ReparamConfig(**names).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(tmp_path).rank_pattern == names["rank_pattern"]


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    config = ReparamConfig()
    config.evaluation = {"perplexity": math.nan}
    with pytest.raises(TypeError, match="`evaluation` must be a dict of names to finite numbers"):
        config.save_pretrained(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_replace_checks_again_and_keeps_the_rest() -> None:
    config = ReparamConfig(target_modules=["q", "k"], r=8, rank_pattern={"q": 4})
    other = dataclasses.replace(config, r=None, keep=0.5)
    assert (other.r, other.keep, other.target_modules, other.rank_pattern) == (None, 0.5, {"q", "k"}, {"q": 4})
    assert (config.r, config.keep) == (8, 0.8)
    assert other.peft_type == PeftType.REPARAM
    with pytest.raises(ValueError, match="`keep` must be in"):
        dataclasses.replace(config, keep=2.0)
    with pytest.raises(ValueError, match="`layers_to_transform` cannot be used"):
        dataclasses.replace(dataclasses.replace(config, layers_to_transform=[0]), target_modules="all-linear")


@PROPERTY
@given(configs())
def test_copies_are_equal_and_independent(config: ReparamConfig) -> None:
    other = copy.deepcopy(config)
    assert other == config
    assert other.loading == config.loading
    other.rank_pattern["a.new.module"] = 7
    assert "a.new.module" not in config.rank_pattern


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alpha'"):
        ReparamConfig(lora_alpha=16)
