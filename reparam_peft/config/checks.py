"""Checks of a config's fields, and of the weights beside it in a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..arguments import check_bool, check_choice, check_int, check_names, check_number, check_regex, is_finite, is_int
from ..numerics.methods import METHODS
from ..numerics.storage import FORMS, narrow_form
from .few_bits import check_few_bits
from .fields import ALLOCATIONS, INPUT_METRICS, OF_ALLOCATION, OF_METRICS, OUTPUT_METRICS, UNREACHED, Fields

FACTORS = ".reparam_factors."
STORED = "the fraction of the parameters that is stored"


def check_fields(config: Fields, from_file: bool) -> None:
    """Raise `TypeError` or `ValueError` where a field is wrong, has no effect, or excludes another.

    Args:
        config: whose fields are checked.
        from_file: whether it is of a checkpoint, in which fields stand as they were resolved.
    """
    _check_size(config)
    _check_choices(config)
    _check_ranges(config, from_file)
    _check_effects(config, from_file)
    _check_modules(config)
    _check_origin(config)
    _check_filled_in(config)
    _check_smaller_sizes(config)
    check_few_bits(config, from_file)


def _check_size(config: Fields) -> None:
    if not (config.r is None or config.r == "full"):
        check_int("r", config.r, "a positive int, 'full' or None", least=1)
    check_number("keep", config.keep, 0, 1, above=True, meaning=STORED)
    if not isinstance(config.rank_pattern, dict):
        raise TypeError(f"`rank_pattern` must be a dict of module name to rank, got {config.rank_pattern!r}.")
    for name, rank in config.rank_pattern.items():
        if not isinstance(name, str) or not is_int(rank):
            raise TypeError(f"`rank_pattern` must map module names to ints, got {name!r}: {rank!r}.")
        if rank < 1:
            raise ValueError(f"`rank_pattern` must hold ranks of at least 1, got {name!r}: {rank}.")


def _check_choices(config: Fields) -> None:
    check_choice("method", config.method, tuple(METHODS), optional=True)
    check_choice("allocation", config.allocation, ALLOCATIONS, optional=True)
    check_choice("form", config.form, FORMS, optional=True)
    check_choice("input_metric", config.input_metric, INPUT_METRICS, optional=True)
    check_choice("output_metric", config.output_metric, OUTPUT_METRICS, optional=True)
    check_choice("unreached", config.unreached, UNREACHED, optional=True)
    for name in ("ensure_weight_tying", "keep_base", "init_weights", "inference_mode", "moved_bias"):
        check_bool(name, getattr(config, name))
    if config.neurons is not None:
        check_bool("neurons", config.neurons)


def _check_ranges(config: Fields, from_file: bool) -> None:
    for name in ("shrinkage", "output_shrinkage", "floor", "ceiling"):
        check_number(name, getattr(config, name), 0, 1, optional=True)
    if config.rank_multiple is not None:
        check_int("rank_multiple", config.rank_multiple, "a positive int or None", least=1)
    floor, ceiling = config.floor or 0.0, 1.0 if config.ceiling is None else config.ceiling
    if floor >= 1 or floor > ceiling:
        raise ValueError(f"`floor` must be below 1 and at most `ceiling`, got {floor!r} and {ceiling!r}.")
    chooses_all_ranks = (
        config.allocation != "uniform" and config.r is None and not (config.rank_pattern or config.dense_modules)
    )
    if chooses_all_ranks and not from_file and floor > config.keep:
        raise ValueError(f"`floor` must be at most `keep`, got {floor!r} and {config.keep!r}.")


def _check_effects(config: Fields, from_file: bool) -> None:
    """What would have no effect is refused."""
    if config.r is not None and config.allocation == "loss":
        raise ValueError(f"`r={config.r!r}` fixes the ranks, and `allocation='loss'` chooses them under `keep`; give one.")
    without_loss = config.allocation == "uniform" or config.r is not None
    for name in OF_ALLOCATION:
        if without_loss and getattr(config, name) is not None:
            raise ValueError(f"`{name}` has an effect with `allocation='loss'` only; leave it out.")
    for name in OF_METRICS:
        if config.method is not None and not METHODS[config.method].needs_data and getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` has an effect with a calibrated method only, not with `method={config.method!r}`; leave it out."
            )
    if without_loss and config.output_metric == "none" and not from_file:  # gradients are of no use
        if config.output_shrinkage is not None:
            raise ValueError("`output_shrinkage` has no effect with uniform ranks and `output_metric='none'`; leave it out.")
        if config.input_metric == "none" and config.shrinkage is not None:
            raise ValueError("`shrinkage` has no effect with uniform ranks and without metrics; leave it out.")


def _check_modules(config: Fields) -> None:
    parameters = config.target_parameters
    if isinstance(parameters, dict) and not all(isinstance(pattern, str) for pattern in parameters.values()):
        raise TypeError(f"`target_parameters` must map names to patterns, got {parameters!r}.")
    if parameters is not None:
        check_names("target_parameters", [*parameters] if isinstance(parameters, dict) else parameters, allows_str=True)
    names = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "dense_modules")
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check_names(name, value, allows_str=name not in ("modules_to_save", "dense_modules"))
    for name in config.modules_to_save or ():
        if not _is_plain(name):
            raise ValueError(
                f"`modules_to_save` must hold names of letters, digits, `_`, `-` and dots, since PEFT reads others as regular "
                f"expressions, got {name!r}."
            )
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str, got {config.target_modules!r}; write the "
                    "layers into the expression, or list the module names."
                )
        check_regex("target_modules", config.target_modules)
    for name in ("exclude_modules", "target_parameters"):
        if isinstance(getattr(config, name), str):
            check_regex(name, getattr(config, name))
    indices = config.layers_to_transform
    for index in indices if isinstance(indices, (list, tuple)) else [indices]:
        if index is not None and not is_int(index):
            raise TypeError(f"`layers_to_transform` must be an int or a list of ints, got {indices!r}.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("`layers_pattern` has no effect without `layers_to_transform`; set both or neither.")


def _check_origin(config: Fields) -> None:
    """What PEFT fills in and reads, and does not check."""
    for name in ("base_model_name_or_path", "revision", "peft_version"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"`{name}` must be a str or None, got {value!r}.")
    mapping = config.auto_mapping
    if mapping is not None and not (isinstance(mapping, dict) and all(isinstance(name, str) for name in mapping.values())):
        raise TypeError(f"`auto_mapping` must be a dict of names or None, got {mapping!r}.")


def _check_filled_in(config: Fields) -> None:
    counts = ("dense_parameters", "stored_parameters", "dense_bytes", "stored_bytes", "calibration_tokens", "gradient_tokens")
    for name in (*counts, "seed"):
        value = getattr(config, name)
        if value is not None and (not is_int(value) or value < 0):
            raise TypeError(f"`{name}` is filled in by the model and must be a count or None, got {value!r}.")
    loss = config.predicted_loss
    if loss is not None and not is_finite(loss):
        raise TypeError(f"`predicted_loss` is filled in by `compress` and must be a finite number or None, got {loss!r}.")
    _check_sizes(config)
    _check_base_sample(config.base_sample)
    figures = config.evaluation
    if figures is not None and not (
        isinstance(figures, dict) and all(isinstance(name, str) and is_finite(value) for name, value in figures.items())
    ):
        raise TypeError(f"`evaluation` must be a dict of names to finite numbers, got {figures!r}.")


def _check_sizes(config: Fields) -> None:
    sizes = config.sizes
    if sizes is None:
        return
    if not isinstance(sizes, dict) or not all(isinstance(name, str) and _is_size(size) for name, size in sizes.items()):
        raise TypeError(
            "`sizes` is filled in by `compress` and must map names of modules to two positive ints, rows and columns, or be "
            f"None, got {sizes!r:.200}."
        )
    for name, size in sizes.items():
        rank = config.rank_pattern.get(name)
        if rank is None or rank > min(size):
            raise ValueError(
                f"`sizes` must hold modules of `rank_pattern`, of ranks of at most the least of both, got {name!r} "
                f"of size {size} and rank {rank}."
            )


def _is_size(size: object) -> bool:
    """Whether it is a number of rows and one of columns."""
    return isinstance(size, (list, tuple)) and len(size) == 2 and all(is_int(count) and count >= 1 for count in size)


def _check_base_sample(sample: object) -> None:
    if sample is None:
        return
    if not isinstance(sample, dict) or not all(isinstance(name, str) and _is_entry(entry) for name, entry in sample.items()):
        raise TypeError(
            "`base_sample` is filled in by the model and must map names of parameters to an index and a finite number, or be "
            f"None, got {sample!r:.200}."
        )


def _is_entry(entry: object) -> bool:
    """Whether it is an index of a parameter and the number there."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    index, number = entry
    return is_int(index) and 0 <= index < 2**63 and is_finite(number)


def _check_smaller_sizes(config: Fields) -> None:
    keeps, ranks = config.smaller_keeps, config.smaller_ranks
    if keeps is None and ranks is None:
        return
    if not (isinstance(keeps, list) and all(isinstance(k, float) and 0 < k < config.keep for k in keeps)):
        raise TypeError(f"`smaller_keeps` is filled in by `compress` and must hold fractions below `keep`, got {keeps!r}.")
    if keeps != sorted(set(keeps), reverse=True):
        raise ValueError(f"`smaller_keeps` must be from large to small, got {keeps!r}.")
    if not isinstance(ranks, dict) or set(ranks) != set(config.rank_pattern):
        raise ValueError("`smaller_ranks` must be a dict of the modules in `rank_pattern`.")
    for name, by_size in ranks.items():
        whole = isinstance(by_size, list) and len(by_size) == len(keeps)
        if not whole or not all(rank is None or is_int(rank) for rank in by_size):
            raise TypeError(f"`smaller_ranks` must hold {len(keeps)} ints or None for {name!r}, got {by_size!r}.")
        if not all(rank is None or 1 <= rank <= config.rank_pattern[name] for rank in by_size):
            raise ValueError(f"`smaller_ranks` must be in [1, {config.rank_pattern[name]}] for {name!r}, got {by_size!r}.")
        if name in (config.sizes or {}):
            _check_narrow_ranks(name, config.rank_pattern[name], min((config.sizes or {})[name]), by_size)


def _check_narrow_ranks(name: str, rank: int, full: int, by_size: list[int | None]) -> None:
    """What has lost neurons cannot get them back, and a matrix that is stored as it is has no lower ranks."""
    if None in by_size or (rank == full and set(by_size) != {rank}):
        raise ValueError(
            f"`smaller_ranks` must hold ranks for {name!r}, which has lost neurons, and {full} alone where that is its rank, "
            f"got {by_size!r}."
        )


def check_plain(config: Fields) -> None:
    """Raise `ValueError` where a config out of a file, of no model yet, holds a regular expression, which may take hours.

    What a model was made with is saved by name, so that only recipes can hold one.
    """
    targets, excluded, layers = config.target_modules, config.exclude_modules, config.layers_pattern
    patterns = {
        "target_modules": [targets] if isinstance(targets, str) else [],
        "exclude_modules": [excluded] if isinstance(excluded, str) else [],
        "layers_pattern": [layers] if isinstance(layers, str) else layers or [],
        "rank_pattern": config.rank_pattern,
    }
    for field, values in patterns.items():
        for value in values:
            if not _is_plain(value):
                raise ValueError(
                    f"`{field}` of a file must hold names of letters, digits, `_`, `-` and dots, got {value!r}; give regular "
                    "expressions in the call, by `ReparamConfig(…)`."
                )


def _is_plain(name: str) -> bool:
    """Whether a regular expression is a name, in which a dot may be another character."""
    return re.fullmatch(r"[\w.-]+", name) is not None


def check_weights(path: Path, config: Fields) -> None:
    """Raise `ValueError` unless the header of a safetensors file is whole and lists the products of a resolved config.

    Of products with numbers in few bits the names are looked at only: shapes of codes are looked at when they are loaded.

    Args:
        path: of the file.
        config: of the adapter in the file.
    """
    ranks, sizes = config.rank_pattern, config.sizes or {}
    try:
        with safe_open(path, framework="pt") as file:
            names = {key: key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(file.get_slice(key).get_shape()) for key, name in names.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from error
    unknown = sorted({name.partition(FACTORS)[0] for name in shapes if FACTORS in name} - ranks.keys())
    if unknown:
        raise ValueError(f"{path} has factors of {unknown[0]}, which its config does not have; the two do not belong together.")
    for name, rank in ranks.items():
        size = sizes.get(name)
        form = config.form_pattern.get(name, config.form or "factors")
        stored = form if size is None else narrow_form(rank, size, form)
        tensors = {"factors": ("B.weight", "A.weight"), "pivot": ("B.weight", "A.mask"), "dense": ("B.weight",)}
        # Of a base model that arrived quantised, what is corrected is its own.
        tensors["corrected"] = (*(("Q.weight",) if name in config.bit_pattern else ()), "B.weight", "A.weight")
        for tensor in tensors[stored]:
            if f"{name}{FACTORS}{tensor}" not in shapes:
                raise ValueError(f"{path} has no factor {tensor[0]} of {name} ({tensor}); it is damaged or of another model.")
        if name in config.bit_pattern:
            continue
        # The pivot form of rank `out` has no K.
        shape = shapes.get(f"{name}{FACTORS}{'A.K.weight' if stored == 'pivot' else 'A.weight'}")
        if shape is not None and (stored == "dense" or len(shape) < 2 or shape[1] != rank):
            raise ValueError(
                f"{path} has a factor A of shape {shape} for {name}, and its config says rank {rank}"
                f"{'' if size is None else f' of a matrix of size {tuple(size)}'}; the two do not belong together."
            )
        if size is not None:
            of_B = (size[0] if stored == "dense" else rank, size[1])
            of_A = (size[0] - rank if stored == "pivot" else size[0], rank)
            for found, expected in ((shapes[f"{name}{FACTORS}B.weight"], of_B), (shape, of_A)):
                if found not in (None, expected):
                    raise ValueError(
                        f"{path} has a factor of shape {found} for {name}, where its config says {expected}; the two do not "
                        "belong together."
                    )
