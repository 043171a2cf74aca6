"""`ReparamConfig`: what it refuses, what it writes, and when it says that weights are about to be loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from peft import PeftConfig, PeftType, get_peft_config
from safetensors.torch import save_file
from strategies import PROPERTY, configs

from reparam_peft import ReparamConfig
from reparam_peft.config import ALLOCATIONS, FORMS, METHODS

NAN, INFINITY = float("nan"), float("inf")

# Field, bad value, error, and words that its message must hold.
BAD_VALUES: list[tuple[str, Any, type[Exception], str]] = [
    ("r", 0, ValueError, "`r` must be a positive int, 'full' or None, got 0"),
    ("r", -8, ValueError, "`r` must be a positive int, 'full' or None, got -8"),
    ("r", 8.0, TypeError, "`r` must be a positive int, 'full' or None, got 8.0"),
    ("r", "half", TypeError, "`r` must be .* got 'half'"),
    ("r", True, TypeError, "`r` must be .* got True"),
    ("r", [8], TypeError, r"`r` must be .* got \[8\]"),
    ("keep", 0, ValueError, r"`keep` must be in \(0, 1\].* got 0"),
    ("keep", 0.0, ValueError, r"`keep` must be in \(0, 1\].* got 0.0"),
    ("keep", -0.5, ValueError, r"`keep` must be in \(0, 1\].* got -0.5"),
    ("keep", 1.01, ValueError, r"`keep` must be in \(0, 1\].* got 1.01"),
    ("keep", NAN, ValueError, r"`keep` must be in \(0, 1\].* got nan"),
    ("keep", INFINITY, ValueError, r"`keep` must be in \(0, 1\].* got inf"),
    ("keep", "0.8", TypeError, r"`keep` must be a number in \(0, 1\], got '0.8'"),
    ("keep", None, TypeError, r"`keep` must be a number in \(0, 1\], got None"),
    ("keep", True, TypeError, r"`keep` must be a number in \(0, 1\], got True"),
    ("method", "pca", ValueError, "`method` must be one of 'svd', 'whitened', 'autoencoder' or None, got 'pca'"),
    ("allocation", "equal", ValueError, "`allocation` must be one of 'uniform', 'loss' or None, got 'equal'"),
    ("form", "qr", ValueError, "`form` must be one of 'factors', 'pivot' or None, got 'qr'"),
    ("keep_base", 1, TypeError, "`keep_base` must be True or False, got 1"),
    ("keep_base", None, TypeError, "`keep_base` must be True or False, got None"),
    ("init_weights", "gaussian", TypeError, "`init_weights` must be True or False, got 'gaussian'"),
    ("inference_mode", "yes", TypeError, "`inference_mode` must be True or False, got 'yes'"),
    ("rank_pattern", ["q_proj"], TypeError, "`rank_pattern` must be a dict of module name to rank, got"),
    ("rank_pattern", None, TypeError, "`rank_pattern` must be a dict of module name to rank, got None"),
    ("rank_pattern", {1: 8}, TypeError, "`rank_pattern` must map module names to ints, got 1: 8"),
    ("rank_pattern", {"q": 8.0}, TypeError, "`rank_pattern` must map module names to ints, got 'q': 8.0"),
    ("rank_pattern", {"q": True}, TypeError, "`rank_pattern` must map module names to ints, got 'q': True"),
    ("rank_pattern", {"q": 0}, ValueError, "`rank_pattern` must hold ranks of at least 1, got 'q': 0"),
    ("rank_pattern", {"(q": 8}, ValueError, r"`rank_pattern` holds '\(q', which is not a valid regular expression"),
    ("target_modules", 3, TypeError, "`target_modules` must be a str or list of module names, got 3"),
    ("target_modules", [3], TypeError, r"`target_modules` must be a str or list of module names, got \[3\]"),
    ("target_modules", ["q", ""], TypeError, r"`target_modules` must be a str or list of module names, got \['q', ''\]"),
    ("target_modules", {"q": 1}, TypeError, "`target_modules` must be a str or list of module names"),
    ("target_modules", "q_proj(", ValueError, r"`target_modules` holds 'q_proj\(', which is not a valid regular expression"),
    ("exclude_modules", 3, TypeError, "`exclude_modules` must be a str or list of module names, got 3"),
    ("exclude_modules", [None], TypeError, r"`exclude_modules` must be a str or list of module names, got \[None\]"),
    ("exclude_modules", "[", ValueError, r"`exclude_modules` holds '\[', which is not a valid regular expression"),
    ("modules_to_save", "classifier", TypeError, "`modules_to_save` must be a list of module names, got 'classifier'"),
    ("modules_to_save", [1], TypeError, r"`modules_to_save` must be a list of module names, got \[1\]"),
    ("dense_modules", "head", TypeError, "`dense_modules` must be a list of module names, got 'head'"),
    ("dense_modules", [""], TypeError, r"`dense_modules` must be a list of module names, got \[''\]"),
    ("layers_to_transform", "1", TypeError, "`layers_to_transform` must be an int or a list of ints, got '1'"),
    ("layers_to_transform", 1.0, TypeError, "`layers_to_transform` must be an int or a list of ints, got 1.0"),
    ("layers_to_transform", [0, True], TypeError, "`layers_to_transform` must be an int or a list of ints"),
    ("layers_pattern", 3, TypeError, "`layers_pattern` must be a str or list of module names, got 3"),
    ("layers_pattern", "layers", ValueError, "`layers_pattern` has no effect without `layers_to_transform`"),
    *(
        (name, value, TypeError, f"`{name}` is filled in by the model and must be a count or None, got {value!r}")
        for name in ("dense_parameters", "stored_parameters", "dense_bytes", "stored_bytes")
        for value in (-1, 1.5, True, "1")
    ),
    ("evaluation", [1.0], TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    ("evaluation", {"perplexity": "20"}, TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    ("evaluation", {1: 2.0}, TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    ("task_type", "POETRY", ValueError, "Invalid task type: 'POETRY'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_VALUES)
def test_refuses(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReparamConfig(**{name: value})


def test_every_own_field_has_a_bad_value_above() -> None:
    own = {f.name for f in dataclasses.fields(ReparamConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own <= {name for name, *_ in BAD_VALUES}


def test_every_own_field_says_what_it_means() -> None:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(ReparamConfig):
        if field.name not in inherited:
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize("targets", ["all-linear", r".*\.q_proj"])
@pytest.mark.parametrize("options", [{"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "layers"}])
def test_layers_cannot_be_picked_from_an_expression(targets: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`layers_to_transform` cannot be used when `target_modules` is a str, got"):
        ReparamConfig(target_modules=targets, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("method", "whitened", "`method='whitened'` needs calibration data"),
        ("method", "autoencoder", "`method='autoencoder'` needs calibration data"),
        ("allocation", "loss", "`allocation='loss'` needs calibration data"),
        ("form", "pivot", "`form='pivot'` needs the pivot form"),
    ],
)
def test_says_what_an_unavailable_choice_needs(name: str, value: str, message: str) -> None:
    assert value in METHODS + ALLOCATIONS + FORMS
    with pytest.raises(ValueError, match=message):
        ReparamConfig(**{name: value})


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


def test_weights_beside_the_config_are_looked_at(tmp_path: Path) -> None:
    prefix = "base_model.model.layer.q.reparam_factors"
    tensors = {f"{prefix}.A.weight": torch.zeros(6, 4), f"{prefix}.B.weight": torch.zeros(4, 5)}
    path = tmp_path / "adapter_model.safetensors"

    def load(rank: int = 4) -> ReparamConfig:
        ReparamConfig(rank_pattern={"layer.q": rank}, stored_parameters=44).save_pretrained(tmp_path)
        return ReparamConfig.from_pretrained(str(tmp_path))

    save_file(tensors, path)
    assert load().rank_pattern == {"layer.q": 4}
    with pytest.raises(ValueError, match=r"has a factor A of shape \(6, 4\) for layer.q, and its config says rank 3"):
        load(rank=3)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load()
    for missing in "AB":
        save_file({key: tensor for key, tensor in tensors.items() if f".{missing}." not in key}, path)
        with pytest.raises(ValueError, match=f"has no factor {missing} of layer.q; it is damaged or of another model"):
            load()


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
