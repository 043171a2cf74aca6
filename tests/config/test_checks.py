"""What `ReparamConfig` refuses: each bad value, and fields that exclude each other."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
from peft import PeftConfig

from reparam_peft import ReparamConfig

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
    ("form", "qr", ValueError, "`form` must be one of 'factors', 'pivot', 'corrected' or None, got 'qr'"),
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
    ("budget", "watts", ValueError, "`budget` must be one of 'parameters', 'bytes', 'flops', 'latency' or None, got 'watts'"),
    *(("bits", value, TypeError, "`bits` must be several of") for value in (8, "8", ["8"], [8.0], [True])),
    *(("bits", value, ValueError, "`bits` must be one or several of .*, each once") for value in ([], [2], [8, 8])),
    ("bits", [8], ValueError, "`bits` has an effect with `budget='bytes'` or `form='corrected'` only"),
    *(("form_pattern", value, TypeError, "`form_pattern` is filled in by the model") for value in (None, [], {1: "pivot"})),
    ("form_pattern", {"q": "qr"}, ValueError, "`form_pattern` must hold some of .* got 'q': 'qr'"),
    ("form_pattern", {"q": "pivot"}, ValueError, "`form_pattern` must hold modules of `rank_pattern`, got 'q'"),
    *(("bit_pattern", value, TypeError, "`bit_pattern` is filled in by the model") for value in (None, [], {1: 8})),
    *(("bit_pattern", {"q": v}, ValueError, "`bit_pattern` must hold some of .* got 'q'") for v in (16, 3, "8", True)),
    ("bit_pattern", {"q": 8}, ValueError, "`bit_pattern` must hold modules of `rank_pattern`, got 'q'"),
    *(("correction_bits", v, ValueError, "`correction_bits` is filled in by the model") for v in (4, 16, True, 8.0)),
    ("neurons", 1, TypeError, "`neurons` must be True or False, got 1"),
    ("unreached", "dropped", ValueError, "`unreached` must be"),
    ("ensure_weight_tying", "yes", TypeError, "`ensure_weight_tying` must be"),
    ("target_parameters", {"rel_attn.q": 1}, TypeError, "`target_parameters` must map names to patterns"),
    *(
        ("sizes", value, TypeError, "`sizes` is filled in by `compress` and must map names of modules to two positive ints")
        for value in ([], {1: [4, 4]}, {"q": [4]}, {"q": [4, 0]}, {"q": [4, 4.0]}, {"q": [True, 4]}, {"q": "44"})
    ),
    (
        "sizes",
        {"q": [4, 4]},
        ValueError,
        r"`sizes` must hold modules of `rank_pattern`.* got 'q' of size \[4, 4\] and rank None",
    ),
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
    ("target_modules", 3, TypeError, "`target_modules` must be a str or list of module names, got 3"),
    ("target_modules", [3], TypeError, r"`target_modules` must be a str or list of module names, got \[3\]"),
    ("target_modules", ["q", ""], TypeError, r"`target_modules` must be a str or list of module names, got \['q', ''\]"),
    ("target_modules", {"q": 1}, TypeError, "`target_modules` must be a str or list of module names"),
    ("target_modules", "q_proj(", ValueError, r"`target_modules` holds 'q_proj\(', which is not a valid regular expression"),
    ("exclude_modules", 3, TypeError, "`exclude_modules` must be a str or list of module names, got 3"),
    ("exclude_modules", [None], TypeError, r"`exclude_modules` must be a str or list of module names, got \[None\]"),
    ("exclude_modules", "[", ValueError, r"`exclude_modules` holds '\[', which is not a valid regular expression"),
    ("modules_to_save", "classifier", TypeError, "`modules_to_save` must be a list of module names, got 'classifier'"),
    ("modules_to_save", ["a|b"], ValueError, r"`modules_to_save` must hold names of letters, digits.* got 'a\|b'"),
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
    ("healed_for", "int2", ValueError, "`healed_for` must be one of 'int8', 'int4' or None, got 'int2'"),
    ("evaluation", [1.0], TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    ("evaluation", {"perplexity": "20"}, TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    *(
        ("evaluation", {"perplexity": value}, TypeError, "`evaluation` must be a dict of names to finite numbers, got")
        for value in (NAN, INFINITY, True, None, 10**400)
    ),
    ("evaluation", {1: 2.0}, TypeError, "`evaluation` must be a dict of names to finite numbers, got"),
    *((name, 3, TypeError, f"`{name}` must be a str or None, got 3") for name in ("base_model_name_or_path", "revision")),
    *(("auto_mapping", value, TypeError, "`auto_mapping` must be a dict of names or None") for value in ("x", {"a": None})),
    *(
        ("base_sample", value, TypeError, "`base_sample` is filled in by the model and must map names of parameters")
        for value in (
            [],
            {1: [0, 1.0]},
            {"w": [0]},
            {"w": [-1, 1.0]},
            {"w": [0, float("nan")]},
            {"w": [0, 10**400]},
            {"w": "01"},
        )
    ),
    ("task_type", "POETRY", ValueError, "Invalid task type: 'POETRY'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_VALUES)
def test_refuses(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReparamConfig(**{name: value})


def test_every_own_field_has_a_bad_value_above() -> None:
    own = {f.name for f in dataclasses.fields(ReparamConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own <= {name for name, *_ in BAD_VALUES}


@pytest.mark.parametrize(
    ("rank", "smaller", "message"),
    [
        (9, [1], r"`sizes` must hold modules of `rank_pattern`.* got 'up' of size \[8, 20\] and rank 9"),
        (4, [None], r"`smaller_ranks` must hold ranks for 'up', which has lost neurons, .* got \[None\]"),
        (8, [4], r"and 8 alone where that is its rank, got \[4\]"),
        (8, [8], None),
        (4, [2], None),
    ],
)
def test_what_has_lost_neurons_has_ranks_that_fit_what_is_left(
    rank: int, smaller: list[int | None], message: str | None
) -> None:
    fields = {"rank_pattern": {"up": rank}, "sizes": {"up": [8, 20]}, "smaller_keeps": [0.5], "smaller_ranks": {"up": smaller}}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        ReparamConfig(**fields)


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
    ({"budget": "bytes", "r": 8}, "`r=8` fixes the ranks, and `budget='bytes'` chooses them"),
    ({"budget": "bytes", "allocation": "uniform"}, "`budget='bytes'` is shared out by predicted loss"),
    ({"budget": "bytes", "neurons": True}, "`neurons=True` and `budget='bytes'` cannot be used together"),
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
