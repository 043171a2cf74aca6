"""Checks of the fields that say how many bits numbers have, and of what does not go with them."""

from __future__ import annotations

from ..arguments import check_choice, is_int
from ..numerics.storage import ALL_FORMS, FEW_BITS, WIDTHS
from .fields import BUDGETS, Fields

CORRECTION_WIDTHS = {8, 16}  # that factors beside a matrix in few bits may have


def check_few_bits(config: Fields, from_file: bool) -> None:
    """Raise `TypeError` or `ValueError` where one of these fields is wrong, has no effect, or excludes another.

    Args:
        config: whose fields are checked.
        from_file: whether it is of a checkpoint, in which fields stand as they were resolved.
    """
    check_choice("budget", config.budget, BUDGETS, optional=True)
    check_choice("healed_for", config.healed_for, ("int8", "int4"), optional=True)
    _check_bits(config)
    _check_patterns(config)
    if config.budget not in (None, "parameters"):
        given = f"`budget={config.budget!r}`"
        if config.r is not None:
            raise ValueError(f"`r={config.r!r}` fixes the ranks, and {given} chooses them under `keep`; give one.")
        if config.allocation == "uniform":
            raise ValueError(f"{given} is shared out by predicted loss, not with `allocation='uniform'`; give one.")
    if config.budget == "latency" and config.neurons:
        raise ValueError(
            "`neurons=True` and `budget='latency'` cannot be used together: MLPs keep their neurons; leave one out."
        )
    if config.chooses_bits:
        _check_excluded(config, from_file)


def check_one_shot(config: Fields, what: str) -> None:
    """Raise `ValueError` where a config has numbers stored in few bits, and something that is asked for cannot.

    Args:
        config: which says so by `budget` or `form`.
        what: is asked for: "`search`".
    """
    if config.chooses_bits or config.bit_pattern or config.form_pattern:
        given = "budget='bytes'" if config.budget == "bytes" else "form='corrected'" if config.chooses_bits else "bit_pattern"
        raise ValueError(
            f"`{given}` has numbers stored in few bits, which {what} does not do; `compress(model, config, batches)` "
            "alone, and without data `get_peft_model`, do."
        )


def _check_bits(config: Fields) -> None:
    bits = config.bits
    if bits is None:
        return
    if not isinstance(bits, (list, tuple, set)) or not all(is_int(width) for width in bits):
        raise TypeError(f"`bits` must be several of {WIDTHS}, got {bits!r}.")
    if not bits or len({*bits}) < len(bits) or not {*bits} <= {*WIDTHS}:
        raise ValueError(f"`bits` must be one or several of {WIDTHS}, each once, got {bits!r}.")
    if not config.chooses_bits:
        raise ValueError("`bits` has an effect with `budget='bytes'` or `form='corrected'` only; leave it out.")
    if config.form == "corrected" and config.least_bits not in FEW_BITS:
        raise ValueError(f"`form='corrected'` needs one of {FEW_BITS} among `bits`, got {bits!r}.")
    if config.form == "corrected" and config.budget == "bytes" and not {*bits} & CORRECTION_WIDTHS:
        raise ValueError(
            "`form='corrected'` with `budget='bytes'` needs 8 or 16 among `bits`, for the factors beside a matrix, got "
            f"{bits!r}."
        )


def _check_patterns(config: Fields) -> None:
    width = config.correction_bits
    if width is not None and (not is_int(width) or width != 8):
        raise ValueError(f"`correction_bits` is filled in by the model and must be 8 or None, got {width!r}.")
    for name, pattern, allowed in (
        ("bit_pattern", config.bit_pattern, FEW_BITS),
        ("form_pattern", config.form_pattern, ALL_FORMS),
    ):
        if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
            raise TypeError(f"`{name}` is filled in by the model and must map names of modules, got {pattern!r:.200}.")
        for key, value in pattern.items():
            if isinstance(value, bool) or value not in allowed:
                raise ValueError(f"`{name}` must hold some of {allowed}, got {key!r}: {value!r}.")
            if key not in config.rank_pattern:
                raise ValueError(f"`{name}` must hold modules of `rank_pattern`, got {key!r}.")
            if value == "dense" and key not in config.bit_pattern:
                raise ValueError(f"`form_pattern` must hold 'dense' of modules of `bit_pattern` only, got {key!r}.")


def _check_excluded(config: Fields, from_file: bool) -> None:
    """What does not go with numbers in few bits."""
    given = "budget='bytes'" if config.budget == "bytes" else "form='corrected'"
    if config.neurons:
        raise ValueError(f"`neurons=True` and `{given}` cannot be used together: MLPs keep their neurons; leave one out.")
    if not config.init_weights:
        raise ValueError(f"`init_weights=False` has no meaning with `{given}`, which rounds the weight itself; leave one out.")
    if config.form == "corrected" and config.budget != "bytes" and not from_file and not is_int(config.r):
        raise ValueError(
            f"`form='corrected'` needs `r`, the rank of the correction, got {config.r!r}: a matrix in few bits and its "
            "correction are more numbers than the matrix has, so that `keep` says nothing. To have ranks chosen under a "
            "budget, use `budget='bytes'`."
        )
