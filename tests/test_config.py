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
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model
from safetensors.torch import save_file
from support.strategies import PROPERTY, configs
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.config.fields import ALLOCATIONS, METHODS
from reparam_peft.numerics.storage import FORMS

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
    ("input_metric", "hessian", ValueError, "`input_metric` must be one of 'gram', 'diagonal', 'none' or None, got 'hessian'"),
    ("output_metric", "gram", ValueError, "`output_metric` must be one of 'fisher', 'diagonal', 'none' or None, got 'gram'"),
    *(
        (name, value, error, message)
        for name in ("shrinkage", "output_shrinkage", "floor", "ceiling")
        for value, error, message in (
            (-0.1, ValueError, rf"`{name}` must be in \[0, 1\], got -0.1"),
            (1.5, ValueError, rf"`{name}` must be in \[0, 1\], got 1.5"),
            (NAN, ValueError, rf"`{name}` must be in \[0, 1\], got nan"),
            ("0.1", TypeError, rf"`{name}` must be a number in \[0, 1\] or None, got '0.1'"),
            (True, TypeError, rf"`{name}` must be a number in \[0, 1\] or None, got True"),
        )
    ),
    ("floor", 1.0, ValueError, "`floor` must be below 1 and at most `ceiling`, got 1.0 and 1.0"),
    ("floor", 0.9, ValueError, "`floor` must be at most `keep`, got 0.9 and 0.8"),
    ("rank_multiple", 0, ValueError, "`rank_multiple` must be a positive int or None, got 0"),
    ("rank_multiple", -8, ValueError, "`rank_multiple` must be a positive int or None, got -8"),
    ("rank_multiple", 8.0, TypeError, "`rank_multiple` must be a positive int or None, got 8.0"),
    ("rank_multiple", True, TypeError, "`rank_multiple` must be a positive int or None, got True"),
    ("moved_bias", None, TypeError, "`moved_bias` must be True or False, got None"),
    ("moved_bias", 1, TypeError, "`moved_bias` must be True or False, got 1"),
    *(
        ("smaller_keeps", value, TypeError, "`smaller_keeps` is filled in by `compress` and must hold fractions below `keep`")
        for value in ("0.5", [0.9], [1], 0.5, {0.5})
    ),
    ("smaller_ranks", {}, TypeError, "`smaller_keeps` is filled in by `compress`"),
    *(
        ("predicted_loss", value, TypeError, "`predicted_loss` is filled in by `compress` and must be a finite number or None")
        for value in ("0.1", True, NAN, INFINITY, [0.1])
    ),
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
        for name in (
            "dense_parameters",
            "stored_parameters",
            "dense_bytes",
            "stored_bytes",
            "calibration_tokens",
            "gradient_tokens",
            "seed",
        )
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


# Two fields that exclude each other, and words that the message must hold.
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"floor": 0.5, "ceiling": 0.4}, "`floor` must be below 1 and at most `ceiling`, got 0.5 and 0.4"),
    ({"floor": 0.5, "keep": 0.4}, "`floor` must be at most `keep`, got 0.5 and 0.4"),
    ({"r": 8, "allocation": "loss"}, "`r=8` fixes the ranks, and `allocation='loss'` chooses them"),
    ({"r": "full", "allocation": "loss"}, "`r='full'` fixes the ranks"),
    *(
        ({name: value, **fixed}, f"`{name}` has an effect with `allocation='loss'` only; leave it out")
        for name, value in (("rank_multiple", 8), ("floor", 0.0), ("floor", 0.1), ("ceiling", 0.9), ("ceiling", 1))
        for fixed in ({"allocation": "uniform"}, {"r": 8})
    ),
    *(
        ({name: value, "method": "svd"}, f"`{name}` has an effect with a calibrated method only, not with `method='svd'`")
        for name, value in (("input_metric", "none"), ("output_metric", "none"), ("shrinkage", 0), ("output_shrinkage", 0.1))
    ),
    *(
        ({name: 0.1, "input_metric": "none", "output_metric": "none", **fixed}, f"`{name}` has no effect with uniform ranks")
        for name in ("shrinkage", "output_shrinkage")
        for fixed in ({"allocation": "uniform"}, {"r": 8})
    ),
    ({"floor": 0.5, "keep": 0.4, "allocation": "loss"}, "`floor` must be at most `keep`, got 0.5 and 0.4"),
]


@pytest.mark.parametrize(("options", "message"), CONFLICTS, ids=str)
def test_fields_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReparamConfig(**options)
    for name, value in options.items():
        ReparamConfig(**{name: value})  # neither is wrong by itself


# What `get_peft_model`, which gets no data, refuses; all of them are valid in a config.
NEEDS_DATA: list[tuple[str, Any, str]] = [
    ("method", "whitened", "`method='whitened'` needs calibration data"),
    ("method", "autoencoder", "`method='autoencoder'` needs calibration data"),
    ("allocation", "loss", "`allocation='loss'` needs calibration data"),
    ("input_metric", "none", "`input_metric` has an effect with calibration data only"),
    ("output_metric", "diagonal", "`output_metric` has an effect with calibration data only"),
    ("shrinkage", 0.0, "`shrinkage` has an effect with calibration data only"),
    ("output_shrinkage", 0.5, "`output_shrinkage` has an effect with calibration data only"),
    ("rank_multiple", 8, "`rank_multiple` has an effect with calibration data only"),
    ("floor", 0.0, "`floor` has an effect with calibration data only"),
    ("ceiling", 1.0, "`ceiling` has an effect with calibration data only"),
]


@pytest.mark.parametrize(("name", "value", "message"), NEEDS_DATA)
def test_what_needs_data_is_refused_where_there_is_none(name: str, value: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = ReparamConfig(target_modules=["0"], **{name: value})
    with pytest.raises(ValueError, match=f"{message}.*`reparam_peft.compress"):
        get_peft_model(model, config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_every_choice_that_a_config_takes_is_data_free_or_refused_above() -> None:
    refused = {(name, value) for name, value, _ in NEEDS_DATA}
    for name, values in (("method", METHODS), ("allocation", ALLOCATIONS), ("form", FORMS)):
        for value in values:
            model = nn.Sequential(nn.Linear(8, 8))
            if (name, value) not in refused:
                get_peft_model(model, ReparamConfig(target_modules=["0"], **{name: value}))


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


@pytest.mark.parametrize("form", FORMS)
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
